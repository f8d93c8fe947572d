"""PEFT adapters with graphs: LoRA configs, the record beside an adapter, and loading."""
