"""Tuning of LLaVA and BLIP-2: what only `train.finetune` needs."""
