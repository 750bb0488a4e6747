"""All rows of the zoo, family by family."""

from __future__ import annotations

from zoo import models_adapted, models_encoder, models_language, models_own, models_timm, models_vision
from zoo.model import ZooModel

ZOO: dict[str, ZooModel] = {
    model.name: model
    for module in (models_language, models_encoder, models_vision, models_timm, models_own, models_adapted)
    for model in module.MODELS
}
