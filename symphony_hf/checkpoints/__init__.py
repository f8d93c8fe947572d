"""Models on disk and on the Hub: saving, graph files, model cards and the upload."""
