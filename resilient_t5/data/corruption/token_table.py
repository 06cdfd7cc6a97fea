"""Properties of the vocabulary for corruption, in active ids: special ids, classes of tokens, look-alikes.

Look-alikes are characters that readers, scanners or input methods confuse. The built-in groups are our own: characters of
similar shape in medical text, letters and digits that scanners confuse, and full-width forms. A user's file adds to them.
"""

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resilient_t5.config.schema import CorruptionConfig
from resilient_t5.data.corruption.gap_encoding import GapEncoding, build_gap_encoding
from resilient_t5.data.tokenizer.tokenizer import TextTokenizer
from resilient_t5.errors import ConfigError, DataError

# Each word is a group of characters that are look-alikes of each other.
_CHINESE_GROUPS = """
己已巳 未末 土士 日曰 人入八 干千于 大太犬 木本术 刀力 午牛 田由甲申 目自 王玉主 血皿 肓盲 炙灸 瘀淤 痢痫 清请情晴睛 渴喝竭揭
抱泡炮饱跑胞 拔拨 狠狼 候侯 辨辩辫 辛幸 哀衰衷 戊戌戍成 崇祟 冶治 师帅 住往佳 折拆析 抓爪瓜 兔免 鸟乌 风凤 贝见 今令 历厉
旦且 臼白 叉又 乞气 汁汗 汤烫荡 沫抹 沾沽 泌沁 消削硝 深探 湿温 漫慢 绕浇饶 执热 焦蕉 燥躁操澡噪 曝瀑爆 旺枉狂 廿甘 痔痣
痿萎 摊滩瘫 搔骚瘙 眩炫弦 睑脸捡险检 瞳膧 碗腕婉 复腹覆 膜模漠 臂臀 肝肘肚 肋胁 汤场扬肠 枝技肢歧 肾贤 肿种钟 胃冒 担坦胆
抬怡胎 脏赃桩 挤济脐剂 恼脑 脱说悦锐 裨碑脾婢 裂烈 诊珍疹趁 贪贫 遗遣 僻避壁璧臂 纳钠呐 押钾 铁跌 组阻祖租 顶颈项 颅颇
额颜 饥肌讥 银龈 侍待持 厂广 仅仪 休体 传转 侧测则 倍培陪 偏遍编 借惜措 代伐 刊刑 卷券 原源 吸级 咳咬 哺捕 噎咽 困因 坏环
堵睹 增赠 夭天夫无 妊妒 孑子 宫官 密蜜 小少 尿屎 屑肩 幼幻 弱溺 径经轻 微徽 念含 忌忘 性姓 恶晋 惊凉 挛孪 振震 损捐 撒撤 放故
斤斥 晕晖 暑署 杆秆 枚牧 栓拴 桔枯 欠久 毫亳 汲吸 沉沈 沙砂 注住 洗冼 浓脓 涨胀 淡谈 滴摘 潮嘲 灰恢 炎谈 烦顿 照熙 牙邪
竟竞 管菅 粘沾 紧累 红江 缓暖 罐灌 耐酎 背肯 膏育 苔笞 茎径 荼茶 蔬疏 蛰蜇 衣农 角甬 赏尝 辐幅 迁迂 适话 逆遂 部陪
酒洒 里野 门问间 陷馅 鬼兔 麻床
"""
_WESTERN_GROUPS = """
0Oo 1lI| 2Zz 5Ss 6b 8B 9gq ce uv nh rn ao kK cC wW xX vV pP ft ij αa βß μu γy ρp κk νv
.。 ,，、 ;:： -–—一 '’` "“” (（[ )）] +十 ×x ~～ %％
"""
# Confusions of more than one character work where the vocabulary has such a piece.
_SEQUENCES = (("rn", "m"), ("cl", "d"), ("vv", "w"), ("ii", "u"))
_FULL_WIDTH_SHIFT = 0xFEE0
_HALF_WIDTH_FORMS = range(0x21, 0x7F)


def built_in_confusions() -> dict[str, set[str]]:
    """text -> its look-alikes; symmetric."""
    table: dict[str, set[str]] = {}
    for group in (_CHINESE_GROUPS + _WESTERN_GROUPS).split():
        _join(table, group)
    for half_width in map(chr, _HALF_WIDTH_FORMS):
        _join(table, (half_width, chr(ord(half_width) + _FULL_WIDTH_SHIFT)))
    for sequence in _SEQUENCES:
        _join(table, sequence)
    return table


def read_confusions(path: Path) -> dict[str, set[str]]:
    """character -> its look-alikes, from a UTF-8 file of lines `character TAB look-alikes`.

    Every character of the second column is a look-alike, white space between them aside; the table is directed. Empty
    lines and lines that start with `#` and have no tab are skipped.

    Raises:
        DataError: the file is missing, is not UTF-8, or has a line of another form; the message names the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the confusion table cannot be read: {error.strerror}", where=str(path), hint="Check corruption.confusions."
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad_line = content[: error.start].count(b"\n") + 1
        raise DataError(
            f"the confusion table is not UTF-8 at byte {error.start}", where=f"{path}:{bad_line}", hint="Save it as UTF-8."
        ) from error
    table: dict[str, set[str]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        if not line.strip() or (line.startswith("#") and "\t" not in line):
            continue
        character, tab, others = line.partition("\t")
        look_alikes = {other for other in others if not other.isspace()} - {character}
        if not tab or len(character) != 1 or not look_alikes:
            raise DataError(
                "not a line of a confusion table",
                where=f"{path}:{number}",
                hint="Write one character, a tab and its look-alikes.",
            )
        table.setdefault(character, set()).update(look_alikes)
    return table


def _join(table: dict[str, set[str]], group: Iterable[str]) -> None:
    """Make all members of a group look-alikes of each other."""
    members = set(group)
    for member in members:
        table.setdefault(member, set()).update(members - {member})


METASPACE = "\u2581"


@dataclass(frozen=True)
class TokenTable:
    """The vocabulary as corruption sees it; every id is an active id."""

    size: int
    """Active ids: 0 to `size` - 1."""
    pad_id: int
    eos_id: int
    sentinel_ids: np.ndarray
    """int32 (sentinels,): element k is the id of sentinel k; T5 has 100."""
    punctuation: np.ndarray
    """bool (size,): punctuation, symbols, space, and single bytes of a character; never masked but inside a term."""
    special: np.ndarray
    """bool (size,): marks without text; never masked, never noised."""
    byte: np.ndarray
    """bool (size,): single bytes of a character; noise would break the character, so they are never noised."""
    confusions: np.ndarray
    """int32 (m,): look-alikes of all ids, one id's after another's."""
    confusion_offsets: np.ndarray
    """int64 (size + 1,): id i has the look-alikes [confusion_offsets[i], confusion_offsets[i + 1])."""
    gap_encoding: GapEncoding | None = None
    """How the tokenizer encodes a text with gaps; None: masked sources need no change."""


def build_token_table(
    tokenizer: TextTokenizer, active_to_full: np.ndarray, confusions_path: Path | None, *, encodes_gaps: bool = True
) -> TokenTable:
    """Classify the active pieces and map the look-alikes that are pieces themselves.

    A look-alike is used only where both characters are active pieces, with or without a word-start mark, so one token replaces
    one token.

    Args:
        active_to_full: int32 (active,), ascending full-vocabulary ids.
        confusions_path: the user's own table, added to the built-in one.
        encodes_gaps: as in `Store`.

    Raises:
        DataError: the end mark, the padding or a sentinel is not active, or the user's table cannot be read.
    """
    size = len(active_to_full)
    all_pieces = tokenizer.pieces()
    if size == 0 or active_to_full[-1] >= len(all_pieces):
        raise DataError("the active vocabulary does not belong to this tokenizer", hint="Prepare the store again.")
    pieces = [all_pieces[full_id] for full_id in active_to_full.tolist()]
    special = np.isin(active_to_full, tokenizer.special_ids)
    byte = np.isin(active_to_full, tokenizer.byte_ids)
    punctuation = np.fromiter((_is_punctuation(piece) for piece in pieces), bool, size)
    confusions, confusion_offsets = _map_confusions(pieces, special | byte, confusions_path)
    sentinel_ids = _active(active_to_full, tokenizer.sentinel_ids, "a sentinel")
    return TokenTable(
        size=size,
        pad_id=int(_active(active_to_full, np.array([tokenizer.pad_id]), "the padding")[0]),
        eos_id=int(_active(active_to_full, np.array([tokenizer.eos_id]), "the end mark")[0]),
        sentinel_ids=sentinel_ids,
        punctuation=(punctuation | byte) & ~special,
        special=special,
        byte=byte,
        confusions=confusions,
        confusion_offsets=confusion_offsets,
        gap_encoding=build_gap_encoding(tokenizer, active_to_full, sentinel_ids) if encodes_gaps else None,
    )


def check_sentinels(tokenizer: TextTokenizer, settings: CorruptionConfig) -> None:
    """Raise ConfigError when the settings ask for more sentinels than the tokenizer has."""
    has = len(tokenizer.sentinel_ids)
    if settings.task == "restore" and settings.max_sentinels > has:
        raise ConfigError(f"corruption.max_sentinels: {settings.max_sentinels}, but the tokenizer has {has}; set it to {has}")


def _is_punctuation(piece: str) -> bool:
    """Whether a piece is nothing but punctuation, symbols, space and control characters."""
    categories = (unicodedata.category(character) for character in piece.replace(METASPACE, ""))
    return all(category[0] in "PSZ" or category in ("Cc", "Cf") for category in categories)


def _active(active_to_full: np.ndarray, full_ids: np.ndarray, name: str) -> np.ndarray:
    """The active ids of full ids, int32; all of them must be active."""
    places = np.minimum(np.searchsorted(active_to_full, full_ids), len(active_to_full) - 1)
    if np.any(active_to_full[places] != full_ids):
        raise DataError(f"{name} is not in the active vocabulary", hint="Prepare the store again.")
    return places.astype(np.int32)


def _map_confusions(pieces: list[str], untouched: np.ndarray, path: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Look-alikes by id as a ragged array: ids int32 (m,), offsets int64 (size + 1,)."""
    table = built_in_confusions()
    for character, look_alikes in (read_confusions(path) if path is not None else {}).items():
        table.setdefault(character, set()).update(look_alikes)
    ids = {piece: number for number, piece in enumerate(pieces) if not untouched[number]}
    confusions: list[int] = []
    counts = np.zeros(len(pieces) + 1, np.int64)
    for piece, number in ids.items():
        text = piece.removeprefix(METASPACE)
        space = piece[: len(piece) - len(text)]
        # Sorted: the order of a set of strings differs from process to process.
        found = sorted(ids[space + other] for other in table.get(text, ()) if space + other in ids)
        confusions.extend(found)
        counts[number + 1] = len(found)
    return np.array(confusions, np.int32), np.cumsum(counts)
