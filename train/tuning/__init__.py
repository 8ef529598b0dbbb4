"""Fine-tuning of LLaVA and BLIP-2; used by `train.finetune` only."""
