"""Reasoning programs in SGLang's frontend language that fork, join and come back to what is cached."""
