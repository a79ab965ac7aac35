"""Token files of other programs: nanoGPT, Megatron-LM, llm.c and modded-nanogpt, packed Parquet. One module a format."""
