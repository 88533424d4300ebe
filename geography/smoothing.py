"""Haversine smoothing: targets over geocells that fall off with the distance from the truth (PIGEON, section 3.2)."""

import sys
from typing import Any, Literal

import numpy as np

PIGEON_TAU_KM = 75.0
PIGEOTTO_TAU_KM = 65.0


def haversine_smoothed_targets(distances_km: Any, true_cell: Any, tau_km: float, rule: Literal["paper", "code"] = "paper") -> Any:
    """Soft targets for a cross-entropy over cells, exp(-(d_i - d_0) / tau), where d_i is the distance to cell i's centroid.

    The targets are *not* normalised: their sum is large where cells are dense, so that such places weigh more in the loss.

    Args:
        distances_km: [batch, num_cells] kilometres from each point to each cell's centroid; numpy array or torch tensor.
        true_cell: [batch] index of the cell that each point lies in.
        tau_km: kilometres over which the target falls to 1/e. It should scale with the cells: 75 for PIGEON's 2,203 cells.
        rule: "paper": d_0 is the distance to the true cell's centroid, so the true cell gets exactly 1 and a cell whose
            centroid is nearer gets more. "code": d_0 is the distance to the nearest centroid, so no target exceeds 1, and
            whatever is not finite becomes 0, as in the published code. The rules differ where another centroid is nearer.

    Returns:
        [batch, num_cells] targets, like `distances_km`.

    Raises:
        ValueError: shapes that do not fit, tau that is not positive, an unknown rule; and, except for tensors on a GPU, cells
            out of range or (rule "paper") distances that are not finite.

    Example:
        >>> haversine_smoothed_targets(np.array([[10.0, 85.0]]), np.array([0]), 75.0).round(4).tolist()
        [[1.0, 0.3679]]
    """
    if rule not in ("paper", "code"):
        raise ValueError(f"rule must be 'paper' or 'code', not {rule!r}")
    if not 0 < tau_km < float("inf"):
        raise ValueError(f"tau_km must be a positive number of kilometres, not {tau_km}")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(distances_km, torch.Tensor):
        cells = torch.as_tensor(true_cell, device=distances_km.device).long()
        _check_shapes(distances_km, cells)
        # on a GPU reading values would make every step wait
        if distances_km.device.type == "cpu":
            _check_values(cells, distances_km.shape[1], rule == "code" or bool(torch.isfinite(distances_km).all()))
        if rule == "paper":
            own = distances_km.gather(1, cells[:, None])
            return torch.exp((own - distances_km) / tau_km)
        nearest = torch.nan_to_num(distances_km, nan=torch.inf).min(dim=1, keepdim=True).values
        return torch.nan_to_num(torch.exp((nearest - distances_km) / tau_km), nan=0.0, posinf=0.0, neginf=0.0)
    distances, cells = np.asarray(distances_km), np.asarray(true_cell)
    if not np.issubdtype(distances.dtype, np.floating):
        distances = distances.astype(np.float64)
    _check_shapes(distances, cells)
    _check_values(cells, distances.shape[1], rule == "code" or bool(np.isfinite(distances).all()))
    if rule == "paper":
        return np.exp((np.take_along_axis(distances, cells[:, None], axis=1) - distances) / tau_km)
    nearest = np.nan_to_num(distances, nan=np.inf, posinf=np.inf).min(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # a row without any finite distance: inf - inf
        return np.nan_to_num(np.exp((nearest - distances) / tau_km), nan=0.0, posinf=0.0, neginf=0.0)


def _check_shapes(distances: Any, cells: Any) -> None:
    if distances.ndim != 2 or not distances.shape[1]:
        raise ValueError(f"distances_km must be [batch, num_cells], not of shape {tuple(distances.shape)}")
    if cells.ndim != 1 or len(cells) != len(distances):
        raise ValueError(f"true_cell must be [{len(distances)}], one cell per point, not of shape {tuple(cells.shape)}")


def _check_values(cells: Any, num_cells: int, finite: bool) -> None:
    if len(cells) and (int(cells.min()) < 0 or int(cells.max()) >= num_cells):
        raise ValueError(
            f"true_cell holds {int(cells.min())} to {int(cells.max())} but there are {num_cells} cells:"
            " leave points without a cell out of the loss"
        )
    if not finite:
        raise ValueError("distances_km holds NaN or infinity: check the coordinates, and that every cell has a centroid")


__all__ = ["PIGEON_TAU_KM", "PIGEOTTO_TAU_KM", "haversine_smoothed_targets"]
