"""The paper's models, one adapter a family: `load_adapter(name_or_path)` picks it by the folder's config.

Nothing here imports transformers or diffusers until a model is loaded.
"""

from __future__ import annotations

from minimal_aia.models.base import Adapter, AdapterError, Batch
from minimal_aia.models.registry import FAMILIES, Family, load_adapter, support_table

__all__ = ["FAMILIES", "Adapter", "AdapterError", "Batch", "Family", "load_adapter", "support_table"]
