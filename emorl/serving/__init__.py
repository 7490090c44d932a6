"""A server in OpenAI's form: a trade-off per request, requests decoded side by side, and a page."""
