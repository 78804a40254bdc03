"""Which words became more frequent; distinct-n and repetition are in evaluation/test_quality.py."""

from ppo_cli.utils.ngrams import most_changed_grams


def test_the_words_that_changed_most_by_the_share_of_texts_that_have_them() -> None:
    ours = ["I loved it.", "Loved it, loved it!", "We loved that", "so dull"]
    their = ["so dull", "so dull.", "so dull!", "I liked it."]
    found = most_changed_grams(ours, their, 1, 3)
    assert [(one.gram, one.share, one.other) for one in found] == [
        ("loved", 0.75, 0.0),  # once a text, whatever its case
        ("dull", 0.25, 0.75),
        ("so", 0.25, 0.75),
    ]
    pairs = most_changed_grams(ours, their, 2, 3)
    assert [(one.gram, one.change) for one in pairs] == [("loved it", 0.5), ("so dull", -0.5)]
    assert [one.gram for one in most_changed_grams(ours, their, 1, 1)] == ["loved", "dull"]
    assert most_changed_grams(["a"], ["b"], 1, 3) == []  # one text more shows nothing
