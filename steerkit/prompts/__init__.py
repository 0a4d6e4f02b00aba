"""From what people write to what the model reads: conversations, contrast sets, chat templates, padded batches.

`contrast_set` holds the data of a fit, `prompt_set` prompts without sides, `readers` reads them from files, `rendering`
makes token ids of them, `batching` pads these, `marks` and `chat_roles` tell who speaks each token.
"""

from __future__ import annotations

from steerkit.prompts.batching import Batch, batches, pad_token_id
from steerkit.prompts.chat_roles import Roles
from steerkit.prompts.contrast_set import ContrastSet
from steerkit.prompts.conversation import Conversation, Message, Prompt
from steerkit.prompts.prompt_set import PromptSet
from steerkit.prompts.rendering import Rendered, has_chat_template, render
from steerkit.prompts.system_prompts import SystemPrompts

__all__ = [
    "Batch",
    "ContrastSet",
    "Conversation",
    "Message",
    "Prompt",
    "PromptSet",
    "Rendered",
    "Roles",
    "SystemPrompts",
    "batches",
    "has_chat_template",
    "pad_token_id",
    "render",
]
