"""FID and its kin of what a transformer draws while it is trained: the evaluation of `flexvar evaluate model`, of fewer pictures."""

from __future__ import annotations

import torch
import torch.distributed as dist

from flexvar.checkpoint import Model
from flexvar.evaluation.drawn import DrawnPictures
from flexvar.evaluation.extractors import load_extractor
from flexvar.evaluation.references import Reference, read_reference
from flexvar.evaluation.runner import evaluate
from flexvar.evaluation.scores import check_all
from flexvar.evaluation.stored import AT_ONCE
from flexvar.pipeline import FlexVARPipeline
from flexvar.training.run_folder import RunFolder
from flexvar.training.settings import ScoresConfig


class Scoring:
    """Scores the model that lies in a run's folder, on all processes together.

    model: one of the same shapes, by which it is told at once what could not be scored. batch: pictures that a process learns from at a
    time: it draws no more.
    Raises ValueError, FileNotFoundError or ConnectionError, in one line, for a reference or an extractor that is missing or does not fit.
    """

    def __init__(self, config: ScoresConfig, folder: RunFolder, model: Model, *, batch: int, rank: int, device: torch.device) -> None:
        self.config, self.folder, self.batch, self.device, self.rank = config, folder, min(AT_ONCE, batch), device, rank
        self.extractor = load_extractor(config.extractor, config.weights or None).to(device)
        self.reference: Reference | str = config.reference
        if rank == 0:  # the others need none
            self.reference = read_reference(config.reference, self.extractor)
            check_all(self._drawn(model), self.reference, self.extractor)

    def done(self, step: int) -> bool:
        """Whether the log has the scores of a step; the first process looks, for all of them."""
        found = [self.rank == 0 and self.folder.has("scores", step)]
        if dist.is_initialized():
            dist.broadcast_object_list(found)
        return found[0]

    def scores(self, model: Model, step: int) -> dict[str, float]:
        """Draws with the model, as the run's folder holds it, writes the report and gives its figures; nothing but on the first process.

        Goes on where a run was killed in the middle of this. Raises ValueError, OSError or MemoryError as `evaluate` does, and says how to
        train without.
        """
        out = self.folder.scores / f"step-{step:07d}.json"
        try:
            report = evaluate(self._drawn(model), self.reference, self.extractor, out, overwrite=True)
        except (ValueError, OSError, MemoryError) as error:
            kind = next(kind for kind in (ValueError, OSError, MemoryError) if isinstance(error, kind))
            mend = "the training is saved; scores.reference= goes on without scores"
            raise kind(f"step {step} was not scored: {str(error) or 'not enough memory'}; {mend}") from error
        return {} if report is None else dict(report.scores)

    def _drawn(self, model: Model) -> DrawnPictures:
        model.tokenizer.to(self.device)
        return DrawnPictures(FlexVARPipeline(model), str(self.folder.model), self.config.per_class, batch=self.batch)
