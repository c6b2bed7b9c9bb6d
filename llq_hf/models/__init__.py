"""What llq-hf knows about models of transformers: where their decoder blocks are, how they load,
how their residual stream can be rotated, and how vision-language models answer.
"""
