"""What distillation gained: errors, the gap closed, learning curves."""
