"""Weights: fetch them, check them, load them. Everything public about them can be imported from here.

download_weights(folder)  -->  verify_weights(folder)  -->  load_model(folder, device_map, dtype)
  download.py, hub.py            verify.py, manifest.py       loading.py, shards.py
                                 consistency.py               convert.py, layout.py
"""

from glmhelpers.weights.consistency import Problem, check_consistency
from glmhelpers.weights.convert import convert_to_safetensors
from glmhelpers.weights.download import download_weights
from glmhelpers.weights.hub import DownloadError
from glmhelpers.weights.layout import part_bytes, part_of, published_shards, stored_bytes
from glmhelpers.weights.loading import LoadReport, load_model
from glmhelpers.weights.manifest import PUBLISHED, read_manifest, total_bytes
from glmhelpers.weights.shards import list_shards, read_entries
from glmhelpers.weights.verify import Report, verify_weights

__all__ = [
    "PUBLISHED",
    "DownloadError",
    "LoadReport",
    "Problem",
    "Report",
    "check_consistency",
    "convert_to_safetensors",
    "download_weights",
    "list_shards",
    "load_model",
    "part_bytes",
    "part_of",
    "published_shards",
    "read_entries",
    "read_manifest",
    "stored_bytes",
    "total_bytes",
    "verify_weights",
]
