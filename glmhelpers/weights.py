"""Weights: fetch them, check them, load them. Everything public about them can be imported from here.

download_weights(folder)  -->  verify_weights(folder)  -->  load_model(folder, device_map, dtype)
  download.py, remotes.py        verify.py, checksums.py      loading.py, placement.py
  manifest.py, progress.py       consistency.py               convert.py, shards.py
"""

from glmhelpers.consistency import Problem, check_consistency
from glmhelpers.convert import convert_to_safetensors
from glmhelpers.download import download_weights
from glmhelpers.loading import LoadReport, load_model, memory_by_part
from glmhelpers.manifest import read_manifest, total_bytes
from glmhelpers.placement import check_placement, expand_device_map
from glmhelpers.remotes import DownloadError
from glmhelpers.verify import Report, verify_weights

__all__ = [
    "DownloadError",
    "LoadReport",
    "Problem",
    "Report",
    "check_consistency",
    "check_placement",
    "convert_to_safetensors",
    "download_weights",
    "expand_device_map",
    "load_model",
    "memory_by_part",
    "read_manifest",
    "total_bytes",
    "verify_weights",
]
