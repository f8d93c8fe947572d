"""Pictures of one grey point, for tests that are not about pictures: rendering takes half of a small run's time."""

import contextlib

import pytest
from matplotlib.figure import Figure

save = Figure.savefig


def save_point(figure, file, *, format=None, **settings):
    """Replace `Figure.savefig`: a PNG is one grey point, and any other format is the figure."""
    if format != "png":
        return save(figure, file, format=format, **settings)
    return save(Figure(figsize=(0.01, 0.01)), file, format="png", dpi=100, facecolor="0.5")


@contextlib.contextmanager
def without_graph_figures():
    """Write pictures of graphs without building their figures, which take longer than the rest of a page or a card."""
    from symphony_hf.diagnostics import plots
    from symphony_hf.diagnostics.plots import heat_maps

    def write(graphs, path):
        save_point(None, path, format="png")
        return path

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((plots, "plot_graphs"), (plots, "plot_expert_network"), (heat_maps, "plot_graphs")):
            patch.setattr(module, name, write)
        yield
