"""What ``patch_model`` leaves in modules that it changed, for ``unpatch_model``. deepcopy and pickle take it along."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from .fallback import Options


@dataclass
class ConfigCopy:
    """A config that was replaced by a private copy. before: the copy's values when it was made; attentions: how many
    modules attend by it."""

    original: PreTrainedConfig
    private: PreTrainedConfig
    before: dict
    attentions: int = 0

    def write_back(self) -> None:
        """Give the original what was changed on the copy since, except the attention implementation."""
        now, original = self.private.__dict__, self.original.__dict__
        for name in now.keys() | self.before.keys():
            if name == "_attn_implementation_internal" or isinstance(now.get(name), PreTrainedConfig):
                continue
            if name not in now:
                original.pop(name, None)
            elif name not in self.before or now[name] != self.before[name]:
                original[name] = now[name]


@dataclass
class Record:
    """What patch_model changed on one module. config: of an attention module; request: patch_model's arguments, on the
    module it was called with."""

    options: Options | None = None
    config: ConfigCopy | None = None
    configs: dict[str, ConfigCopy] = field(default_factory=dict)
    original_class: type | None = None
    request: dict | None = None

    def __getstate__(self) -> dict:
        """For pickle and deepcopy: a request with functions in it stays behind, since most cannot be pickled."""
        told = self.request is not None and any(callable(value) for value in self.request.values())
        return self.__dict__ | {"request": None} if told else self.__dict__
