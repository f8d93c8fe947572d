"""Names of the routers' tensors in the checkpoints of each family that an engine can serve.

It stands alone because adding a family changes nothing else.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterNames:
    """Names of a family's router tensors in a checkpoint, where they may differ from those in its model.

    Attributes:
        router: Name of the router within its decoder layer. Its graph is `<router>.symphony`.
        parameters: Names of the linear map's parameters within the router. Other tensors of the router, such as a bias
            by which experts are chosen, are not smoothed.
        in_model: Name of the router in Transformers' model, which the setting `routers` is about, if it is another.
    """

    router: str
    parameters: tuple[str, ...] = ("weight",)
    in_model: str | None = None


ROUTERS = {
    "Glm4MoeForCausalLM": RouterNames("mlp.gate"),
    "GraniteMoeForCausalLM": RouterNames("block_sparse_moe.router", ("layer.weight",)),
    "MixtralForCausalLM": RouterNames("block_sparse_moe.gate", in_model="mlp.gate"),
    "OlmoeForCausalLM": RouterNames("mlp.gate"),
    "Qwen2MoeForCausalLM": RouterNames("mlp.gate"),
    "Qwen3MoeForCausalLM": RouterNames("mlp.gate"),
}
"""Router names by the name of the family's model class in Transformers. Each family was run in vLLM.

A family that vLLM configures by its name, such as GPT-OSS, has no row: a class of another name would miss that.

An engine reads the names of the checkpoint, and knows neither Transformers' model nor how it renames weights; so these
names are written down here, and a test compares the result with `export_folded` for each family.
"""
