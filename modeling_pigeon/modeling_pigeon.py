# Copyright 2026 The geobased authors. Licensed under the Apache License, Version 2.0.
"""PIGEON (Haas et al. 2023): a CLIP vision tower that classifies images into geocells and refines the answer by prototypes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import CLIPVisionModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput, is_torchdynamo_compiling, logging

from .answers_pigeon import PigeonAnswer, abstains, mass_radius_km, radius_scale
from .configuration_pigeon import PigeonConfig
from .geocells_pigeon import GeocellTable
from .geodesy_pigeon import UNSET, check_coordinates
from .heads_pigeon import PigeonHeads
from .loss_pigeon import cell_loss
from .placement_pigeon import likely_places
from .prototypes_pigeon import PigeonPrototypes
from .refinement_pigeon import Candidates, EmbeddingTable, PrototypeRefinement

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_pigeon.PigeonConfig",
    "AutoModel": "modeling_pigeon.PigeonForImageGeolocalization",
    "AutoModelForImageGeolocalization": "modeling_pigeon.PigeonForImageGeolocalization",
}


@dataclass
class PigeonOutput(ModelOutput):
    """What a forward pass computes.

    Attributes:
        loss: the sum of the losses below, weighted already; None without any labels.
        cell_loss: of the cell head; None without `labels`.
        head_losses: name: loss, of the auxiliary heads that have labels.
        logits: [batch, num_cells], of the cell head.
        head_outputs: name: [batch, size], (standardised) values of regressions and logits of classifications.
        embeddings: [batch, hidden_size], what the heads read; a panorama's is the mean of its views'.
        hidden_states, attentions: the tower's, of each view, if asked for.
    """

    loss: torch.Tensor | None = None
    cell_loss: torch.Tensor | None = None
    head_losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    head_outputs: dict[str, torch.Tensor] | None = None
    embeddings: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class PigeonPreTrainedModel(PreTrainedModel):
    """What PIGEON models share: configuration, initialisation, loading and saving."""

    config: PigeonConfig
    config_class = PigeonConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    # the losses are means over the batch: a trainer that accumulates gradients must divide them itself
    accepts_loss_kwargs = False
    _no_split_modules = ["CLIPEncoderLayer", "CLIPVisionEmbeddings"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # buffers that a checkpoint lacks
        if isinstance(module, GeocellTable):
            init.constant_(module.centroids_e7, UNSET)
            init.zeros_(module.radii_m)
        elif isinstance(module, EmbeddingTable):
            for buffer in module.buffers():
                init.zeros_(buffer)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers. The folder also holds the code, for `trust_remote_code=True` where geobased is not installed."""
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)


class PigeonForImageGeolocalization(PigeonPreTrainedModel):
    """Tells where on Earth an image was taken.

    Example:

    ```python
    >>> from geobased.modeling_pigeon import PigeonForImageGeolocalization
    >>> model = PigeonForImageGeolocalization.from_clip("openai/clip-vit-base-patch32", num_cells=2)
    >>> model.set_geocells(torch.tensor([[55.7, 13.2], [37.4, -122.2]]))
    >>> model.locate(pixel_values).coordinates  # [batch, 2], (latitude, longitude)
    ```
    """

    def __init__(self, config: PigeonConfig):
        super().__init__(config)
        self.vision_tower = CLIPVisionModel._from_config(config.vision_config)
        # no embedding passes through it: weights without gradients would stop distributed training
        self.vision_tower.post_layernorm = nn.Identity()
        self.cell_head = nn.Linear(config.vision_config.hidden_size, config.num_cells)
        self.heads = PigeonHeads(config)
        self.geocells = GeocellTable(config.num_cells)
        self.refinement = PrototypeRefinement(config)
        self.post_init()

    @classmethod
    def from_clip(cls, clip: str | PreTrainedModel, **config_kwargs: Any) -> "PigeonForImageGeolocalization":
        """A model with the vision tower of a CLIP model and new heads.

        Args:
            clip: a folder or Hub id of a CLIP checkpoint (StreetCLIP's, say), or a `CLIPModel` or `CLIPVisionModel` in memory,
                whose weights are copied.
            config_kwargs: of [`PigeonConfig`], `num_cells` above all.

        Raises `ValueError` for a model without a CLIP vision tower.
        """
        tower = CLIPVisionModel.from_pretrained(clip) if isinstance(clip, str) else getattr(clip, "vision_model", clip)
        if not isinstance(tower, CLIPVisionModel):
            raise ValueError(f"{type(clip).__name__} has no CLIP vision tower: give a CLIPModel, a CLIPVisionModel or a path")
        model = cls(PigeonConfig(vision_config=tower.config.to_dict(), **config_kwargs))
        weights = {name: value for name, value in tower.state_dict().items() if not name.startswith("post_layernorm.")}
        model.vision_tower.load_state_dict(weights)
        return model.to(dtype=tower.dtype)  # type: ignore[call-arg]

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_tower.embeddings.patch_embedding

    def freeze_tower(self, trainable_layers: int = 0) -> None:
        """Freezes the vision tower but for its last `trainable_layers` encoder layers (PIGEON: 1 where it trains on images).

        Raises `ValueError` if there are not so many.
        """
        layers = self.vision_tower.encoder.layers
        if not 0 <= trainable_layers <= len(layers):
            raise ValueError(f"trainable_layers={trainable_layers} must lie between 0 and the tower's {len(layers)} layers")
        self.vision_tower.requires_grad_(False)
        for layer in layers[len(layers) - trainable_layers :]:
            layer.requires_grad_(True)

    def unfreeze_tower(self) -> None:
        """Makes the whole vision tower trainable again."""
        self.vision_tower.requires_grad_(True)

    def set_geocells(self, centroids: torch.Tensor, radii_km: torch.Tensor | None = None) -> None:
        """Sets the cells' centroids [num_cells, 2], (latitude, longitude) in degrees, which are saved with the model.

        `radii_km` [num_cells], such as the median distance of a cell's images from its centroid, widen error radii; 0 if not
        given. Raises `ValueError` for another number of cells and for centroids that are no places.
        """
        self.geocells.fill(torch.as_tensor(centroids), None if radii_km is None else torch.as_tensor(radii_km))

    def set_prototypes(self, prototypes: PigeonPrototypes | None) -> None:
        """Sets the prototypes of refinement, which are saved with the model; None takes them away.

        Raises `ValueError` if they are of another width or of cells that there are not.
        """
        width, num_cells = self.config.vision_config.hidden_size, self.config.num_cells
        if prototypes is not None:
            for embeddings in (prototypes.embeddings, prototypes.image_embeddings):
                if embeddings.dim() != 2 or embeddings.shape[1] != width:
                    raise ValueError(f"prototypes must be [n, {width}], not of shape {tuple(embeddings.shape)}")
            if len(prototypes) and not 0 <= int(prototypes.cells[0]) <= int(prototypes.cells[-1]) < num_cells:
                raise ValueError(f"prototypes are of cells up to {int(prototypes.cells[-1])}, but num_cells={num_cells}")
        self.config.num_prototypes = 0 if prototypes is None else len(prototypes)
        self.config.num_prototype_images = 0 if prototypes is None else len(prototypes.image_prototypes)
        refinement = PrototypeRefinement(self.config)
        if prototypes is not None:
            refinement.fill(prototypes)
        self.refinement = refinement.to(self.device, self.dtype)

    def get_embeddings(
        self,
        pixel_values: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Embeddings [batch, hidden_size] of images, and the tower's output (None if it did not run).

        pixel_values is [batch, channels, height, width] or, for panoramas, [batch, views, channels, height, width]; in its
        place embeddings [batch, hidden_size] or [batch, views, hidden_size] may be given. view_mask [batch, views] is 0 at
        views that are not there; these are not computed.

        Raises `ValueError` for other shapes and for images without any view.
        """
        if (pixel_values is None) == (embeddings is None):
            raise ValueError("give exactly one of pixel_values and embeddings")
        given, item_dims, name = (pixel_values, 3, "pixel_values") if embeddings is None else (embeddings, 1, "embeddings")
        assert given is not None
        width = self.config.vision_config.hidden_size
        if given.dim() - item_dims not in (1, 2) or (embeddings is not None and given.shape[-1] != width):
            item = "channels, height, width" if embeddings is None else str(width)
            raise ValueError(f"{name} must be [batch, {item}] or [batch, views, {item}], not of shape {tuple(given.shape)}")
        single = given.dim() == item_dims + 1
        views = given.unsqueeze(1) if single else given
        if views.shape[1] == 0:
            raise ValueError(f"{name} has no views: shape {tuple(given.shape)}")
        real = None
        if view_mask is not None:
            if view_mask.shape != views.shape[:2]:
                raise ValueError(f"view_mask has shape {tuple(view_mask.shape)}, not [batch, views] = {tuple(views.shape[:2])}")
            real = view_mask.to(views.device) != 0
            if not is_torchdynamo_compiling() and not bool(real.any(1).all()):
                raise ValueError(f"view_mask leaves image {int((~real.any(1)).nonzero()[0])} without any view")
        items, outputs = views.flatten(0, 1) if real is None else views[real], None
        if embeddings is None:
            outputs = self.vision_tower(pixel_values=items, **kwargs)
            hidden = outputs.last_hidden_state
            items = hidden.mean(1) if self.config.embedding == "token_mean" else hidden[:, 0]
        items = items.to(self.dtype)
        if single:
            return items, outputs
        if real is None:
            return items.view(*views.shape[:2], -1).mean(1), outputs
        owners = real.nonzero()[:, 0]
        total = items.new_zeros(len(real), width, dtype=torch.float32).index_add(0, owners, items.float())
        return (total / real.sum(1, keepdim=True)).to(self.dtype), outputs

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        head_labels: Mapping[str, torch.Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> PigeonOutput | tuple[Any, ...]:
        """Logits of all heads, and the losses of those that have labels.

        Args:
            pixel_values, embeddings, view_mask: see `get_embeddings`.
            labels: [batch], the true geocells.
            coordinates: [batch, 2], the true places, (latitude, longitude) in degrees; with `labels`, unless
                `smoothing_tau_km` is None.
            head_labels: name of an auxiliary head: its labels. Values [batch, size] of a regression (NaN: not known), classes
                [batch] (-100: not known) or probabilities [batch, size] of a classification.

        Raises `ValueError` for inputs and labels that do not fit, and coordinates that are no places.
        """
        features, outputs = self.get_embeddings(pixel_values, embeddings, view_mask, **kwargs)
        logits = self.cell_head(features)
        head_outputs = self.heads(features)
        loss_of_cells = None
        if labels is not None:
            loss_of_cells = self.config.cell_loss_weight * self._cell_loss(logits, labels, coordinates)
        head_losses = self.heads.losses(head_outputs, head_labels) if head_labels else None
        losses = [*([] if loss_of_cells is None else [loss_of_cells]), *(head_losses or {}).values()]
        output = PigeonOutput(
            loss=torch.stack(losses).sum() if losses else None,
            cell_loss=loss_of_cells,
            head_losses=head_losses,
            logits=logits,
            head_outputs=head_outputs or None,
            embeddings=features,
            hidden_states=None if outputs is None else outputs.hidden_states,
            attentions=None if outputs is None else outputs.attentions,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _cell_loss(self, logits: torch.Tensor, labels: torch.Tensor, coordinates: torch.Tensor | None) -> torch.Tensor:
        config = self.config
        labels = labels.to(logits.device)
        if labels.shape != logits.shape[:1] or labels.is_floating_point():
            raise ValueError(
                f"labels must be the true geocells, integers [{len(logits)}], not {labels.dtype} of shape {tuple(labels.shape)}"
            )
        # values are checked on a GPU as well: it waits once a step, and a wrong place would train the model in silence
        checked = not is_torchdynamo_compiling()
        if checked and bool(((labels < 0) | (labels >= config.num_cells)).any()):
            wrong = labels[(labels < 0) | (labels >= config.num_cells)][0].item()
            raise ValueError(f"labels holds cell {wrong}, but there are cells 0 to {config.num_cells - 1}")
        centroids = None
        if config.smoothing_tau_km is not None:
            if coordinates is None:
                raise ValueError(
                    "the smoothed loss needs the true coordinates beside labels; smoothing_tau_km=None in the configuration is"
                    " plain cross entropy"
                )
            if coordinates.shape[:1] != labels.shape:
                raise ValueError(f"coordinates has {len(coordinates)} rows but labels has {len(labels)}")
            if checked:
                check_coordinates(coordinates)
            centroids = self.geocells.centroids()
        return cell_loss(
            logits,
            labels.long(),
            coordinates,
            centroids,
            config.smoothing_tau_km,
            config.smoothing_rule,
            config.smoothing_normalize,
        )

    @torch.no_grad()
    def locate(
        self,
        pixel_values: torch.Tensor | None = None,
        embeddings: torch.Tensor | None = None,
        view_mask: torch.Tensor | None = None,
        *,
        top_k: int | None = None,
        refine: bool = True,
        coverage: float | None = None,
        **kwargs: Any,
    ) -> PigeonAnswer:
        """Where images were taken.

        Args:
            pixel_values, embeddings, view_mask: see `get_embeddings`.
            top_k: how many candidates to return; `refinement_top_k` by default.
            refine: whether prototypes change the answer. Without (or without prototypes) places are the cells' centroids, unless
                the configuration's place_rule is "likelihood".
            coverage: of `error_radius_km`; the configuration's `radius_coverage` by default. In a model that was never
                calibrated the radius is that of the disc which holds so much of the cells' probability.

        Raises `ValueError` for images whose logits are not finite, a model without geocells, and a coverage that the model is
        not calibrated for.
        """
        config = self.config
        top_k = min(config.refinement_top_k if top_k is None else top_k, config.num_cells)
        coverage = config.radius_coverage if coverage is None else coverage
        if top_k < 1 or not 0 < coverage < 1:
            raise ValueError(f"top_k={top_k} must be at least 1 and coverage={coverage} lie between 0 and 1")
        scale = radius_scale(config, coverage)
        if not config.radius_scales:
            logger.warning_once("this model's error radii are not calibrated: config.radius_scales is not set")
        centroids, radii = self.geocells.centroids(), self.geocells.radii_km()
        features, _ = self.get_embeddings(pixel_values, embeddings, view_mask, **kwargs)
        logits = self.cell_head(features).float()
        bad = ~torch.isfinite(logits).all(1)
        if bool(bad.any()):
            raise ValueError(f"image {int(bad.nonzero()[0])} gives no finite logits: are its pixels NaN or infinite?")
        probabilities = (logits / config.cell_temperature).softmax(1)
        found = self._candidates(features, probabilities, centroids, top_k, refine and config.num_prototypes > 0)
        best = found.coordinates[:, 0]
        usual = config.radius_coverage
        radius = scale * mass_radius_km(best, probabilities, centroids, radii, coverage)
        if config.abstain_radius_km is None or coverage == usual:
            usual_radius = radius
        else:
            usual_radius = radius_scale(config, usual) * mass_radius_km(best, probabilities, centroids, radii, usual)
        return PigeonAnswer(
            coordinates=best,
            error_radius_km=radius,
            abstain=abstains(config, usual_radius, found.scores[:, 0]),
            candidate_cells=found.cells,
            candidate_scores=found.scores,
            candidate_coordinates=found.coordinates,
            cell_probabilities=probabilities,
            embeddings=features,
        )

    def _candidates(
        self, features: torch.Tensor, probabilities: torch.Tensor, centroids: torch.Tensor, top_k: int, refine: bool
    ) -> Candidates:
        config = self.config
        if config.place_rule == "likelihood":
            if refine:
                competing = max(top_k, min(config.refinement_top_k, config.num_cells))
                refined = self.refinement(features, probabilities, centroids, competing)
                probabilities = probabilities.scatter(1, refined.cells, refined.scores.to(probabilities.dtype))
            tau = config.smoothing_tau_km if config.place_tau_km is None else config.place_tau_km
            return likely_places(probabilities, centroids, top_k, tau, config.place_neighbors)
        if refine:
            return self.refinement(features, probabilities, centroids, top_k)
        scores, cells = probabilities.topk(top_k, dim=1)
        return Candidates(cells, scores, centroids[cells])


__all__ = ["PigeonForImageGeolocalization", "PigeonOutput", "PigeonPreTrainedModel"]
