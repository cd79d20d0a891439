"""Trainers: SFT, reward models and GRPO over one loop."""
