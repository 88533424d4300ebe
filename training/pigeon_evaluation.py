"""What a PIGEON in training is measured by: the metrics of `geobased.geography.evaluation` on the held-out blocks."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.trainer_utils import EvalPrediction

from geobased.geography.evaluation import EvaluationResult, evaluate
from geobased.modeling_pigeon import PigeonAnswer

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

TOP_CELLS = 5
# columns of the arrays that the Trainer gathers
PREDICTION_COLUMNS = ("latitude", "longitude", "radius_km", "probability")


def prediction_rows(answer: PigeonAnswer, columns: int = TOP_CELLS) -> torch.Tensor:
    """An answer as [batch, 4 + columns] float64: `PREDICTION_COLUMNS`, then the likeliest cells, before refinement (-1: none)."""
    probabilities = answer.cell_probabilities
    assert probabilities is not None and answer.coordinates is not None and answer.error_radius_km is not None
    top = probabilities.topk(min(columns, probabilities.shape[1]), dim=1)
    cells = torch.nn.functional.pad(top.indices, (0, columns - top.indices.shape[1]), value=-1)
    numbers = (answer.coordinates, answer.error_radius_km[:, None], top.values[:, :1], cells)
    return torch.cat([part.to("cpu", torch.float64) for part in numbers], dim=1)


def truth_rows(coordinates: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Truths as [batch, 3] float64: latitude, longitude, cell."""
    return torch.cat([coordinates.to("cpu", torch.float64), cells[:, None].to("cpu", torch.float64)], dim=1)


class PigeonMetrics:
    """`compute_metrics` of the Trainer.

    Args:
        country_codes: [num_cells] the country of each cell. An answer's country is that of its likeliest cell, the true one
            that of the true cell.
        coverage: nominal coverage of the answers' error radii.
    """

    def __init__(self, country_codes: "ArrayLike", coverage: float) -> None:
        self.country_codes, self.coverage = np.asarray(country_codes), coverage

    def result(self, predictions: np.ndarray, truths: np.ndarray, bootstrap: int = 0, seed: int = 0) -> EvaluationResult:
        """The whole evaluation, with intervals if `bootstrap` is not 0."""
        cells, true_cells = predictions[:, len(PREDICTION_COLUMNS)].astype(int), truths[:, 2].astype(int)
        return evaluate(
            predictions[:, :2],
            truths[:, :2],
            predicted_countries=self.country_codes[cells].tolist(),
            countries=self.country_codes[true_cells].tolist(),
            confidences=predictions[:, 3],
            correct=cells == true_cells,
            error_radii_km={self.coverage: predictions[:, 2]},
            bootstrap=bootstrap,
            seed=seed,
        )

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Percent within distances, kilometres, GeoScore, accuracies of country and cell, calibration of the cells."""
        predictions, truths = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        result = self.result(predictions, truths)
        metrics: dict[str, Any] = {name: estimate.value for name, estimate in result.metrics.items()}
        hits = predictions[:, len(PREDICTION_COLUMNS) :] == truths[:, 2:3]
        return metrics | {
            "cell_accuracy": 100.0 * float(hits[:, 0].mean()),
            "cell_top5_accuracy": 100.0 * float(hits.any(1).mean()),
            "expected_calibration_error": result.calibration["expected_calibration_error"],
        }


__all__ = ["PigeonMetrics", "prediction_rows", "truth_rows"]
