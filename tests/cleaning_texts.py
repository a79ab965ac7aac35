"""Texts to clean: prose that no rule objects to, and the same sentence in languages with and without spaces."""

from __future__ import annotations

import random

_PARTS = ("mill", "stone", "grain", "wheel", "river", "flour", "loaf", "oven", "sack", "baker")

SENTENCES = {
    "en": "The miller grinds the grain by the river, and the baker bakes bread from it for the whole village.",
    "de": "Der Müller mahlt das Korn am Fluss, und der Bäcker backt daraus das Brot für das ganze Dorf.",
    "fr": "Le meunier moud le grain près de la rivière, et le boulanger en fait du pain pour tout le village.",
    "es": "El molinero muele el grano junto al río y el panadero hace con él el pan para todo el pueblo.",
    "ru": "Мельник мелет зерно у реки, а пекарь печёт из него хлеб для всей деревни.",
    "ar": "الطحان يطحن الحبوب بجانب النهر، والخباز يخبز منها الخبز لكل القرية.",
    "hi": "चक्कीवाला नदी के किनारे अनाज पीसता है और नानबाई उससे पूरे गाँव के लिए रोटी पकाता है।",
    "ko": "방앗간 주인은 강가에서 곡식을 빻고 제빵사는 그것으로 온 마을의 빵을 굽는다.",
    "zh": "磨坊主在河边磨谷物，面包师用它为全村人烤面包。",
    "ja": "粉屋は川のそばで穀物をひき、パン屋はそれで村じゅうのパンを焼く。",
    "th": "คนโม่แป้งบดเมล็ดข้าวริมแม่น้ำ และคนทำขนมปังอบขนมปังให้ทั้งหมู่บ้าน",
}
SPACELESS = ("zh", "ja", "th")


def prose(n_words: int = 120, seed: int = 1) -> str:
    """English words of which none comes twice but for 'the' and 'of', in lines of ten that end as sentences."""
    draw = random.Random(seed)
    words = [f"{draw.choice(_PARTS)}{_letters(k)}" for k in range(n_words)]
    words[::10] = ["The" if k % 20 == 0 else "of" for k in range(0, n_words, 10)]
    lines = [" ".join(words[k : k + 10]) + "." for k in range(0, n_words, 10)]
    return "\n".join(lines) + "\n"


def _letters(k: int) -> str:
    return chr(97 + k // 26 % 26) + chr(97 + k % 26) + chr(97 + k // 676)
