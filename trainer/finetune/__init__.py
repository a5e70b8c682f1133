"""Continual fine-tuning: tuners compared over one or more tasks, measuring what is gained and what is forgotten."""
