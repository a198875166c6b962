"""What models and trainings cost in time and memory."""
