#!/bin/sh
# A name in _keep_in_fp32_modules_strict keeps every module in float32 whose name begins with it or only contains it, and does so in from_pretrained alone: a model made with from_config in bfloat16 has none in float32.
#
#     sh findings/transformers-float32-names-match-inside-others.sh
#
# It installs transformers==5.24.0 torch==2.13.0 into a temporary folder, makes its input itself, prints version, behaviour and output, and exits with
# another code than 0 if the behaviour has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel


class Config(PreTrainedConfig):
    model_type = "finding"


class Model(PreTrainedModel):
    config_class = Config
    _keep_in_fp32_modules_strict = {"head"}

    def __init__(self, config):
        super().__init__(config)
        for name in ("head", "overhead", "heading", "other"):
            setattr(self, name, torch.nn.Linear(2, 2))
        self.post_init()


def in_float32(model):
    return sorted(name for name, layer in model.named_children() if layer.weight.dtype == torch.float32)


AutoConfig.register("finding", Config)
AutoModel.register(Config, Model)
Model(Config()).save_pretrained("model")
loaded = in_float32(AutoModel.from_pretrained("model", dtype=torch.bfloat16))
made = in_float32(AutoModel.from_config(Config(), dtype=torch.bfloat16))
print("\ntransformers", version("transformers"), "| in float32, loaded:", loaded, "| from_config:", made)
assert loaded == ["head", "heading", "overhead"] and made == []
PYTHON
