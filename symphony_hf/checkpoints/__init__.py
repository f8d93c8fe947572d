"""Models on disk and on the Hub: saving, graph files, model cards and the upload."""

from .folder import RECORD_NAME, ModelFolder, open_folder
from .provenance import Origin, hub_name
from .upload import publish, write_card

__all__ = ["RECORD_NAME", "ModelFolder", "Origin", "hub_name", "open_folder", "publish", "write_card"]
