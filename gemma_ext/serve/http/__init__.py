"""The OpenAI wire format over an engine."""
