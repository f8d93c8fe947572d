"""Whether spaces separate the words of a text, by its script."""

import pytest

from symphony_hf.evaluation.attacks.text import find_text_attack
from symphony_hf.evaluation.words import are_spaced

ENGLISH = "the old harbour has a tower .\n"
CHINESE = "机器翻译的质量取决于数据和模型的规模\n"

SPACED = {
    "Tamil, two words a line": "பொருளாதாரம் வளர்ச்சியடைந்துள்ளது\nநாடாளுமன்றத்தில் விவாதிக்கப்பட்டது\n",
    "English, one word a line": "the\norchestra\nplayed\nits\nsymphony\nto\nan\nempty\nhall\nof\nand\nleft\n",
    "one long word": "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Korean": "모델의규모와데이터의품질에따라기계번역의성능이달라진다고알려져있다\n",
    "an address": "https://example.org/a/rather/long/address/of/a/page/without/any/space?and=its&many=settings",
    "digits": "1234567890" * 20,
    "English with a name in Chinese": f"{ENGLISH}机器翻译\n",
    "Chinese, segmented": "机器 翻译 的 质量 取决于 数据 和 模型 的 规模\n",
    "empty": "",
}
UNSPACED = {
    "Chinese": CHINESE,
    "rare characters": "\U00020000\U0002a700\U00030000\n",
    "Japanese": "モデルのおおきさによる\n",
    "narrow Katakana": "ﾓﾃﾞﾙﾉｵｵｷｻﾆﾖﾙ\n",
    "Thai, spaces between phrases": "สวัสดีครับ ผมชื่อสมชาย ยินดีที่ได้รู้จัก\n",
    "Lao": "ສະບາຍດີຂ້ອຍຊື່ສົມໃຈ\n",
    "Khmer": "សួស្តីខ្ញុំឈ្មោះសុខា\n",
    "Burmese": "မင်္ဂလာပါကျွန်တော့်နာမည်\n",
    "Tibetan": "བཀྲ་ཤིས་བདེ་ལེགས།\n",
    "Chinese with a name in English": f"{CHINESE}harbour\n",
}


@pytest.mark.parametrize("text", SPACED.values(), ids=SPACED)
def test_scripts_with_spaces_have_words_however_few_a_line_has(text):
    assert are_spaced([text])
    assert are_spaced([text] * 12)
    for name in ("aaa", "word_drop", "word_shuffle"):
        find_text_attack(name).check_words([text] * 12, "texts")  # neither refused nor warned about
        find_text_attack(name).check_words([text, *[ENGLISH] * 11], "texts")


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_scripts_without_spaces_have_no_words(text):
    assert not are_spaced([text])
    assert not are_spaced([text] * 12)


def test_texts_are_taken_together_in_any_order():
    """The beginning of each is enough, so that one long text does not decide alone."""
    texts = [ENGLISH * 5000, *[CHINESE * 600] * 2]
    assert not are_spaced(texts)
    assert not are_spaced(texts[::-1])
    assert are_spaced([*texts, *[ENGLISH * 400] * 2])
