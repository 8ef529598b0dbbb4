"""The installed commands: their arguments and entry points, which import torch and our packages only when they run."""
