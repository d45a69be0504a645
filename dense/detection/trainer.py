"""Detectron2's trainers; a NaN or infinite loss in one process stops all of them."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling.proposal_generator import RPN
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from dense.amp import warn_of_float16
from dense.finite import stop_if_not_finite

_ADVICE = "a lower optimizer.lr, or train.amp.precision=bfloat16, may help"


def build_trainer(
    cfg: DictConfig, model: nn.Module, loader: Iterable, optimizer: Optimizer
) -> SimpleTrainer:
    """Build the AMP or float32 trainer, as ``train.amp`` says.

    If a loss or an RPN output is NaN or infinite in any process, it raises FloatingPointError in
    every process, before the optimizer step.
    """
    # Detectron2 logs a traceback for every error; the message of this one is enough.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_loss)
    if not cfg.train.amp.enabled:
        trainer: SimpleTrainer = _Trainer(model, loader, optimizer)
    else:
        precision = getattr(torch, cfg.train.amp.get("precision", "float16"))
        warn_of_float16(model, precision, "train.amp.precision")
        trainer = _AMPTrainer(model, loader, optimizer, precision=precision)
    for module in model.modules():
        if isinstance(module, RPN):
            module.rpn_head.register_forward_hook(trainer.look_at_proposals)
    return trainer


class _Finite:
    def _write_metrics(
        self, loss_dict: Mapping[str, Tensor], data_time: float, *args: Any, **kwargs: Any
    ) -> None:
        # Called between backward and step. Detectron2's own check stops the main process only.
        stop_if_not_finite(loss_dict, self.iter + 1, self.optimizer, _ADVICE)
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)

    def look_at_proposals(self, head: nn.Module, inputs: Any, outputs: tuple) -> None:
        """Check the RPN: its own check raises in one process, the others hang in a SyncBN."""
        if not head.training:
            return
        logits, deltas = (
            torch.stack([level.detach().float().abs().amax() for level in levels]).amax()
            for levels in outputs
        )
        largest = {"largest objectness logit": logits, "largest proposal delta": deltas}
        stop_if_not_finite(largest, self.iter + 1, self.optimizer, _ADVICE)


class _Trainer(_Finite, SimpleTrainer):
    pass


class _AMPTrainer(_Finite, AMPTrainer):
    pass


def _is_no_loss(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], FloatingPointError))
