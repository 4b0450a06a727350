"""ShardedTrainer: a `Trainer` that saves and resumes a model of several ranks, its optimizer included."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Trainer, TrainingArguments

from .. import parallel
from ..durable import discard
from ..errors import UserError
from ..hf.hooks import takes_a_mean
from ..moe import moe_layers
from ..parallel.checkpoint import first_does
from ..parallel.scope import why_local

__all__ = ["SHARDED", "ShardedTrainer"]

SHARDED = "sharded"
"""The folder of a checkpoint with the weights and moments as the ranks hold them."""


class ShardedTrainer(Trainer):
    """A Trainer for models of `shunter.hf.distribute`, and any other: their checkpoints hold the optimizer, too.

    transformers' own refuses to save the optimizer of a model on several ranks, and to resume one. Here a checkpoint
    has, beside the ordinary folder, what `parallel.save` writes: it resumes at any number of ranks.

    In training a sparse layer decides, and measures its balance, over the tokens of all ranks, so that the losses are
    those of one process with the whole batch (`parallel.decide_globally`); routers that learn by reward or mix tokens
    into slots go by their rank's.

    Args:
        scope: "rank" for decisions and losses over each rank's own tokens, where logits are too many to gather.

    Raises:
        ValueError: for another scope.
    """

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *,
        scope: Literal["batch", "rank"] = "batch",
        **kwargs: Any,
    ) -> None:
        if scope not in ("batch", "rank"):
            raise ValueError(f'ShardedTrainer: scope {scope!r} is unknown; choose "batch" or "rank"')
        sharded = args is not None and getattr(model, "is_distributed_loading_by_transformers", False)
        asked = args is not None and args.save_only_model
        if sharded:
            assert args is not None
            args.save_only_model = True  # all that transformers' own allows
        super().__init__(model=model, args=args, **kwargs)
        self.args.save_only_model = asked
        if sharded and scope == "batch":
            for layer in moe_layers(model).values():
                if not (why_local(layer.decider) or {"forward", "solve"} & vars(layer.decider).keys()):
                    parallel.decide_globally(layer, evaluation=False)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As a Trainer's, of all labels of a step, on all ranks, also where the model's own is the mean over its batch.

        transformers' own is then too large by the number of ranks and of micro-batches, and weighs each alike.
        """
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        own = self.label_smoother is None and self.compute_loss_func is None and labels is not None
        if own and num_items_in_batch is not None and takes_a_mean(self.model) and not moe_layers(self.model):
            loss = loss * ((labels != -100).sum() / num_items_in_batch)  # a sparse model's hook does so itself
        return (loss, outputs) if return_outputs else loss

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir) / SHARDED
        first_does(lambda: discard(folder) if folder.exists() else None)  # as a Trainer writes over a checkpoint
        parallel.save(self.model, getattr(self.optimizer, "optimizer", self.optimizer), folder)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_distributed_loading_by_transformers:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not (Path(resume_from_checkpoint) / SHARDED).is_dir():
            raise UserError(
                f"{resume_from_checkpoint}: has no folder {SHARDED}; it was saved with save_only_model, or by another "
                "Trainer than shunter's ShardedTrainer. Load the model from there, and begin anew"
            )
        parallel.load(self.model, None, Path(resume_from_checkpoint) / SHARDED)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_distributed_loading_by_transformers:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        parallel.load(self.model, optimizer, Path(checkpoint) / SHARDED)
        scheduler = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)
