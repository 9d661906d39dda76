"""A language model as the trunk: frozen layers read item vectors in place of words; adapters are trained."""

from __future__ import annotations

import copy
import hashlib
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fedrec.errors import ConfigError
from fedrec.models.configs import LanguageConfig
from fedrec.models.layers import LayerNorm, make_linear, normal, product, rows
from fedrec.models.sequence import INITIAL, NextItem
from fedrec.random import Key

FOLDER = "FEDREC_MODELS"


class LanguageModel(NextItem):
    """``h = LLM_frozen+LoRA(P v)``, ``v_i = W t_i + b + M r_i``: items come from their text as in `TextTransformer`.

    The weights of the language model stand in a folder on every machine and are no parameters here: they are not
    trained, do not travel and are in no release. An update carries the adapters, the items' own numbers and the
    projections. Clients train one after the other, for the layers are not ours.

    Source: items as vectors between the words of a frozen language model: Liao et al., SIGIR 2024 (LLaRA); adapters: Hu
    et al., ICLR 2022 (LoRA), by peft.
    """

    row_names: ClassVar[frozenset[str]] = frozenset({"popularity", "text", "residual"})
    together: ClassVar[bool] = False

    def __init__(self, config: LanguageConfig, n_items: int, key: Key) -> None:
        """Load the language model, put adapters beside its layers, and draw what is trained from `key`.

        Raises:
            ConfigError: packages or weights are missing, the weights are others than the experiment's, or the model
                reads ahead.
        """
        super().__init__(config, n_items, key)
        self.body = _with_adapters(config, key)
        width = int(self.body.config.hidden_size)
        self.widen = make_linear(config.dim, width, key.child("widen"), 0)
        self.narrow = make_linear(width, config.dim, key.child("narrow"), 0)
        self.norm = LayerNorm(config.dim)
        _check_causal(self.body, width)

    def make_items(self, key: Key) -> None:
        """Draw the projection and the mixing; the text vectors are zeros until the server places them."""
        c = self.settings
        assert isinstance(c, LanguageConfig)
        self.text = nn.Parameter(torch.zeros(self.n_items, c.features.rank))
        self.residual = nn.Parameter(torch.zeros(self.n_items, c.residual))
        self.mix = nn.Parameter(normal(key.child("mix"), (c.dim, c.residual), c.residual**-0.5))
        self.projection = make_linear(c.features.rank, c.dim, key.child("projection"), 0)
        with torch.no_grad():
            self.projection.weight.copy_(normal(key.child("projection"), (c.dim, c.features.rank), INITIAL))

    def vectors(self, numbers: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Return the vectors of items by number."""
        made: Tensor = self.projection(rows(self.text, numbers)) + product(rows(self.residual, numbers), self.mix)
        return made

    def table(self) -> Float[Tensor, "n d"]:
        """Return the vectors of all items."""
        made: Tensor = self.projection(self.text) + product(self.residual, self.mix)
        return made

    def trunk(
        self, x: Float[Tensor, "b l d"], items: Int[Tensor, "b l"], seeds: Int[Tensor, " b"] | None
    ) -> Float[Tensor, "b l e"]:
        """Return the state after each input; the language model drops nothing."""
        read = self.widen(x * self.settings.dim**0.5)
        states = self.body(inputs_embeds=read, use_cache=False).last_hidden_state
        out: Tensor = self.norm(x + self.narrow(states))
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """Copy what is trained and share the frozen weights, which may be large."""
        memo.update({id(buffer): buffer for buffer in self.body.buffers()})
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            copied.__dict__[name] = copy.deepcopy(value, memo)
        return copied


def weights_digest(folder: Path) -> str:
    """Return the SHA-256 over the settings and the weights in a folder, which `model.sha256` must name."""
    state = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with file.open("rb") as handle:
            state.update(file.name.encode() + hashlib.file_digest(handle, "sha256").digest())
    return state.hexdigest()


def _with_adapters(config: LanguageConfig, key: Key) -> Any:
    if find_spec("transformers") is None or find_spec("peft") is None:
        raise ConfigError(
            'model.kind = "language" needs the packages transformers and peft; install them with: '
            "pip install 'fedrec[language]'."
        )
    from peft import LoraConfig, inject_adapter_in_model

    body = copy.deepcopy(_loaded(_folder(config), config.sha256))
    targets: Any = list(config.adapted) or "all-linear"
    try:
        body = inject_adapter_in_model(LoraConfig(r=config.lora, lora_alpha=config.lora, target_modules=targets), body)
    except ValueError as error:
        raise ConfigError(f"model.adapted: {str(error).splitlines()[0]}") from error
    with torch.no_grad():  # peft draws from torch's global generator
        for name, value in body.named_parameters():
            if ".lora_A." in name:
                value.copy_(normal(key.child(name), tuple(value.shape), value.shape[1] ** -0.5))
    for module in body.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if ".lora_" not in name and not parameter.requires_grad:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach(), persistent=False)
    return body.eval()


def _folder(config: LanguageConfig) -> Path:
    root = os.environ.get(FOLDER)
    folder = Path(root or ".") / config.name
    if root is None or not (folder / "config.json").is_file():
        raise ConfigError(
            f"The language model '{config.name}' is not here: put its folder (config.json, *.safetensors) into the one "
            f"that ${FOLDER} names, on the server and on every node."
        )
    return folder


@lru_cache(maxsize=1)
def _loaded(folder: Path, sha256: str) -> Any:
    found = weights_digest(folder)
    if found != sha256:
        raise ConfigError(
            f"The weights in '{folder.name}' have SHA-256 {found}, and model.sha256 says otherwise; every machine must "
            "hold the same."
        )
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(str(folder), local_files_only=True, dtype=torch.float32).eval()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise ConfigError(f"Cannot load the language model '{folder.name}': {reason}") from error


@torch.no_grad()
def _check_causal(body: Any, width: int) -> None:
    """Refuse a model whose first state knows the second input: it would be trained to read the answer."""
    x = normal(Key.from_seed(0), (1, 2, width), 1.0)
    first, other = (
        body(inputs_embeds=part, use_cache=False).last_hidden_state[0, 0]
        for part in (x, x * torch.tensor([[[1.0], [-1.0]]]))
    )
    if not torch.allclose(first, other, atol=1e-4):
        raise ConfigError("This language model reads ahead, as an encoder does; take one that predicts the next word.")
