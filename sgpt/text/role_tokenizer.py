"""A tokenizer of one role: called plainly, it puts the markers around a text and cuts it, as its post-processor says.

For readers that know no roles: transformers, ONNX Runtime, text-embeddings-inference. `tokenizers` cuts a text before
it puts the post-processor's tokens around it, so a marker is never cut off, and the text is tokenised alone, so nothing
merges with one. sentence-transformers, which has one tokenizer for both roles, takes them from a chat template
(sgpt/text/template.py).
"""

import copy

from tokenizers import processors

from sgpt.runtime.errors import InputError
from sgpt.text.markers import Frame

CONTENT = "$A"  # of a post-processor's template: the text itself


def role_tokenizer(tokenizer, frame: Frame):
    """A copy that puts the frame, markers and special tokens, around every text, and cuts to it with truncation=True.

    InputError where the tokenizer has no tokenizer.json, as only that has a post-processor.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no tokenizer.json, which can put the markers around a text; use "
            "formats=[sentence-transformers] with markers=none"
        )
    of_role = copy.deepcopy(tokenizer)
    before, after = (tokenizer.convert_ids_to_tokens(list(ids)) for ids in (frame.before, frame.after))
    ids = dict(zip([*before, *after], [*frame.before, *frame.after], strict=True))
    of_role.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, CONTENT, *after], special_tokens=[*ids.items()]
    )
    of_role.chat_template = None
    for key in ("add_bos_token", "add_eos_token"):  # by which transformers would make a post-processor of its own
        of_role.init_kwargs.pop(key, None)
    return of_role
