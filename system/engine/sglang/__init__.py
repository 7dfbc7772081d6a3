"""The real SGLang server: how to install it, start it, and what it loads of ours."""
