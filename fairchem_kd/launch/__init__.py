"""From a config to its ranks: in this process, in several, or as a scheduler's jobs."""
