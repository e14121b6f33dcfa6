"""What ``patch_model`` leaves in modules that it changed, for ``unpatch_model``. deepcopy and pickle take it along."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from .fallback import Options
from .report import Calls


@dataclass
class ConfigCopy:
    """A config that was replaced by a private copy. before: the copy's values when it was made; attentions: how many
    modules attend by it."""

    original: PreTrainedConfig
    private: PreTrainedConfig
    before: dict
    attentions: int = 0

    def changes(self) -> list[str]:
        """Names of what was changed on the copy since, except the attention implementation."""
        now, before = self.private.__dict__, self.before
        return [
            name
            for name in now.keys() | before.keys()
            if name != "_attn_implementation_internal"
            and not isinstance(now.get(name), PreTrainedConfig)
            and not (name in now and name in before and _same(now[name], before[name]))
        ]

    def write_back(self, names: list[str]) -> None:
        """Give the original what was changed."""
        for name in names:
            if name in self.private.__dict__:
                self.original.__dict__[name] = self.private.__dict__[name]
            else:
                self.original.__dict__.pop(name, None)


def _same(a, b) -> bool:
    """Whether two values are equal; what gives no yes or no (arrays, tensors, what holds them) counts as changed."""
    try:
        return bool(a == b)
    except Exception:
        return False


@dataclass
class Record:
    """What patch_model changed on one module. config and calls: of an attention module; called: whether patch_model was
    called with this module, and request: its arguments then."""

    options: Options | None = None
    config: ConfigCopy | None = None
    calls: Calls | None = None
    configs: dict[str, ConfigCopy] = field(default_factory=dict)
    original_class: type | None = None
    called: bool = False
    request: dict | None = None

    def __getstate__(self) -> dict:
        """For pickle and deepcopy: a copy counts its calls anew, and a request with functions in it stays behind, since
        most cannot be pickled."""
        state = self.__dict__ | {"calls": None if self.calls is None else Calls()}
        told = self.request is not None and any(callable(value) for value in self.request.values())
        return state | {"request": None} if told else state
