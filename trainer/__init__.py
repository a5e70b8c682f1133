"""Stage two of diffmix: self-supervised training on pair sets, and continual fine-tuning."""
