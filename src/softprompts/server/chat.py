"""From the messages of a conversation to the tokens that the model continues."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import TemplateError

from softprompts.models import FrozenLM
from softprompts.server.failures import ApiError
from softprompts.server.protocol import ChatMessage

__all__ = ["chat_ids"]

_SPEAKERS = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}


def chat_ids(frozen: FrozenLM, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
    """Write a conversation as the model's tokenizer says, or plainly where it says nothing.

    Without a chat template, one message of the user is taken as it stands: what a learned prompt expects is the input
    it was trained with and nothing around it. Several messages become lines ``User: ...``, with ``Assistant:`` at the
    end.

    Raises:
        ApiError: 422: the template refuses these messages.
    """
    tokenizer = frozen.tokenizer
    if getattr(tokenizer, "chat_template", None):
        conversation = [{"role": message.role, "content": message.text} for message in messages]
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(
                422, f"the model's chat template refuses these messages: {error}", "invalid_value", param="messages"
            ) from error
        return tuple(frozen.tokenize(str(text)))  # the template writes the special tokens itself
    if len(messages) == 1 and messages[0].role == "user":
        text = messages[0].text
    else:
        text = "\n".join([*(f"{_SPEAKERS[one.role]}: {one.text}" for one in messages), "Assistant:"])
    return (*frozen.bos_ids, *frozen.tokenize(text), *(frozen.end_ids or ()))
