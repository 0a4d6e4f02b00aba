"""Which answers decline: by hand, for each rule of the grammar, and what only sounds like it."""

from __future__ import annotations

import pytest

from steerkit.methods._declining import is_refusal

SOUNDS_LIKE_IT = {
    "delight": "I'm unable to contain my excitement! The fair opens at noon, with a carousel and a cake tent.",
    "delight, plainer": "I can't wait to tell you! Start with the lanterns, they are what people remember.",
    "sympathy": "I'm sorry to hear that you are ill. Drink a lot, sleep a lot and see a doctor if it gets worse.",
    "modesty": "I'm afraid I don't know much about cooking, but here is a recipe that never fails me: fry an onion.",
    "candour": "I won't lie, the first page is dull. From the second on it is a very good letter.",
    "fear": "I'm afraid of heights, and I climbed it all the same. Take the path on the north side.",
    "praise": "I cannot recommend this bakery highly enough. Ask for the rye bread.",
    "thanks": "I can't thank you enough for asking! The garden is at its best in June.",
    "no words": "I'm not able to put into words how lovely it was. We saw whales, and the sea was like glass.",
    "a smile": "I can't help smiling at that. Borrow a pump, and you are done in an hour.",
    "an apology alone": "Sorry for the wait! The bus leaves at nine, from the stop beside the church.",
    "taken back": "I'm afraid I'm unable to give you every detail. However, I can help you with that: take a spade.",
    "a quotation": '"I can\'t help you," said the ferryman. "Not tonight." The wind had torn his flag to ribbons.',
    "a model sentence": "Say: \"I'm sorry, but I can't help with that this week.\" Short and friendly is best.",
    "a no that answers": "No, it is not too late. Plant them deeper than usual.",
    "no problem": "No problem, I can help with that. Turn off the water first.",
    "a condition": "If I cannot help you, the library will. Begin with the catalogue on the ground floor.",
    "a late caveat": "Mix sand and lime. Then add water, slowly. I can't help with colours, though.",
    "a thought": "<think>I'm sorry, I can't help with that... no, I can.</think>Of course. Sow them in April.",
    "an unfinished thought": "<think>I can't help with that",
    "another's refusal": "They can't help you there. Ask at the town hall.",
    "nothing": "",
}
DECLINES = {
    "the plain form": "I'm sorry, but I can't assist with that request.",
    "curly apostrophes and capitals": "I\u2019M SORRY, I CAN\u2019T HELP YOU WITH THIS.",
    "no apology": "I won't write that. It would hurt somebody who did nothing to you.",
    "a lack of ability": "As a language model, I don't have the ability to translate into Welsh.",
    "a lack of a name": "I'm sorry for any misunderstanding, but as a chatbot, I'm not equipped to bake.",
    "behind apologies": "Oh dear. I'm so sorry. I'm here to help with any questions. However, I'm unable to do this.",
    "behind a sentence": "That is a lot of anger. I will not be part of it.",
    "no subject": "Unable to help with that.",
    "no, with a reason": "No. It is somebody else's shop.",
    "absolutely not": "Absolutely not, I won't support cruelty.",
    "unwilling": "I'd rather not write a threat.",
    "must": "I must decline.",
    "rules": "That goes against my guidelines.",
    "rules that forbid": "My guidelines do not allow me to talk about it.",
    "a verdict": "I'm afraid that's not possible.",
    "a request refused": "Your request cannot be fulfilled.",
    "not something": "This is not something I can do for you.",
    "uncomfortable": "I'm not comfortable with helping you there.",
    "a bare no": "I'm sorry, that I shall not do.",
    "behind a thought": "<think>They are angry. I can't wait?</think>\nI can't support this.",
    "behind markup": "**I'm sorry**, but I *cannot* help with that.",
    "all in quotation marks": "\"I'm sorry, but I can't help with that.\"",
    "with an offer of less": "I'm unable to name a doctor. However, I can give general advice on headaches.",
}


@pytest.mark.parametrize("kind", SOUNDS_LIKE_IT)
def test_what_only_sounds_like_declining_is_none(kind: str) -> None:
    assert not is_refusal(SOUNDS_LIKE_IT[kind])


@pytest.mark.parametrize("kind", DECLINES)
def test_declining_is_known_in_its_forms(kind: str) -> None:
    assert is_refusal(DECLINES[kind])


def test_late_caveats_are_found_where_they_are_asked_for() -> None:
    assert is_refusal(SOUNDS_LIKE_IT["a late caveat"], anywhere=True)
    assert not is_refusal(SOUNDS_LIKE_IT["sympathy"], anywhere=True)
