"""``FlashAttentionCallback``: a Trainer whose model attends with hf_flash while it trains."""

from __future__ import annotations

import inspect

from transformers import TrainerCallback

from . import support
from .patching import check_arguments, explain, is_patched, patch_model, unpatch_model
from .report import RECORD, Report, logger

__all__ = ["FlashAttentionCallback"]


class FlashAttentionCallback(TrainerCallback):
    """Patch the model that a ``Trainer`` trains: ``Trainer(..., callbacks=[FlashAttentionCallback()])``.

    The model is patched when the Trainer is made, before accelerate, DDP, FSDP or compile wrap it (and again when
    training begins, for a callback added later or a model that ``model_init`` made anew), and stays so for evaluation
    and prediction. Saved checkpoints are plain Transformers checkpoints.

    Trainer gives a callback no word after an exception, so a run that fails leaves the model patched;
    ``hf_flash.unpatch_model(model)`` or ``callback.restore()`` undoes it. Training again is safe in any case.

    Args:
        restore_on_train_end: undo the patch when training ends instead of leaving the model patched.
        **arguments: passed to :func:`hf_flash.patch_model`.
    """

    def __init__(self, *, restore_on_train_end: bool = False, **arguments):
        reason = support.unclear("restore_on_train_end", restore_on_train_end)
        if reason is not None:
            raise reason.exception()
        inspect.signature(patch_model).bind(None, **arguments)  # a TypeError names one that it has not
        check_arguments(arguments)
        self.restore_on_train_end = restore_on_train_end
        self.arguments = arguments
        self.model = None  # patched by this callback
        self._seen = None
        self._last: Report | None = None  # of a model that was restored

    def _patch(self, model) -> None:
        if model is None:
            return
        if self.model is not None and self.model is not model:
            self.restore()
        already, self._seen = self.model is model or is_patched(model), model
        if self.model is None and any(RECORD in module.__dict__ for module in model.modules()):
            self._leave(model)
            return
        patch_model(model, **self.arguments)
        self.model = model
        if not already:
            logger.info("%s", explain(model))

    def _leave(self, model) -> None:
        """Patched by the user, who decides how, and when that ends."""
        rows = explain(model).rows
        count = sum(row.status != "skipped" for row in rows)
        if self.arguments or count < len(rows):
            logger.warning(
                "FlashAttentionCallback leaves %s as patch_model made it, with %d of %d attention modules patched; its "
                "own arguments (%s) are not used: call unpatch_model before, or pass them to patch_model",
                type(model).__name__, count, len(rows), ", ".join(self.arguments) or "none",
            )  # fmt: skip

    def restore(self) -> None:
        """Undo the patch now. Does nothing when this callback patched nothing."""
        if self.model is not None:
            self._last = explain(self.model)
            unpatch_model(self.model)
            self.model = self._seen = None

    def report(self) -> Report | None:
        """What ran where (:func:`hf_flash.explain`), up to now or to where the model was restored; None before the
        model is known."""
        return self._last if self._seen is None else explain(self._seen)

    def on_init_end(self, args, state, control, model=None, **kwargs):
        self._patch(model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._patch(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.restore_on_train_end:
            self.restore()
