"""Export a LLaVA with an alpha tower to a directory of stock classes (docs/export.md); see `mllm.export_command`.

python scripts/export_model.py DIR_OR_HUB_ID OUT [--adapter ADAPTER] [--alpha-weights CKPT_OR_DIR]
"""

from mllm.export_command import main

if __name__ == "__main__":
    raise SystemExit(main())
