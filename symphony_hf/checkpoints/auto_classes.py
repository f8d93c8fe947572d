"""Auto class of transformers for a model that is known by the names in its files."""

_MAPPINGS = {  # with transformers' mapping of each
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",  # a model with images comes whole
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}
_BY_TYPE = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM")
"""Auto classes that a model type stands for, if no class is named."""

_OURS = {"WikiTextMoeForCausalLM": "AutoModelForCausalLM", "WikiTextMoeModel": "AutoModel"}
"""Classes that this package registers."""

_TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
"""PEFT's task type -> Auto class of the base model. A language model's may be one with images as well."""


def auto_class_of(
    class_name: str | None, model_type: str | None, task_type: str | None = None, *, has_images: bool = False
) -> str:
    """Return the name of the class that loads a model: an Auto class, or its own where no Auto class has it.

    Args:
        class_name: Model class, which decides if it is known: another one of the family has another head.
        model_type: Model type of the config.
        task_type: Task type of a PEFT adapter.
        has_images: Whether the config has a vision tower's.
    """
    import transformers
    from transformers.models.auto import modeling_auto  # it imports scikit-learn

    if class_name is not None:
        for name, mapping in _MAPPINGS.items():
            for known in getattr(modeling_auto, mapping).values():
                if class_name == known or (isinstance(known, tuple) and class_name in known):
                    return name
        if class_name in _OURS:
            return _OURS[class_name]
        if hasattr(transformers, class_name):  # and not a class of the user's own, which nobody could import
            return class_name
    if task_type in _TASKS:
        return _TASKS[task_type]
    of_type = (name for name in _BY_TYPE if model_type in getattr(modeling_auto, _MAPPINGS[name]))
    return next(of_type, "AutoModelForImageTextToText" if has_images else "AutoModelForCausalLM")
