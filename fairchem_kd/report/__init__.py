"""How results are shown: tables, figures, files and pages."""
