"""The built-in corpus `builtin:clinical`: synthetic clinical notes in Chinese and English.

A note is about one disease, which determines all other terms: two symptoms, an examination and its finding, a drug, its dose
and its course. Each term occurs once, so a masked term cannot be copied from elsewhere in the note. The sentences, their order
and the fillers are drawn independently of the disease, so the words around a gap reveal the kind of the missing term but not
the term. A model can restore it only from the other terms.

Note i is a function of (seed, i) only, drawn from the raw words of Philox, which are stable across releases of numpy.

The tables and sentences were written for this project: common medical knowledge, simplified, not for use on patients. A test
checks four properties of every row and template:

* a disease, its two symptoms, its examination, finding and drug belong to one disease only; dose and course are shared by few,
  so that any visible term determines the disease or nearly so, and the disease determines every other term;
* no term occurs in a template or filler, so the term matcher finds exactly the terms of the note;
* two terms are at least two words or punctuation marks apart, so that the neighbours of a gap do not name the disease;
* every slot is followed by punctuation only, and by different marks: SentencePiece does not join a term and a mark, and makes a
  piece only of strings with more than one continuation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np

Language = Literal["zh", "en"]


class Facts(NamedTuple):
    """Terms that belong together, in one language; the fields are the slots of the templates."""

    disease: str
    complaint: str
    sign: str
    examination: str
    finding: str
    drug: str
    dose: str
    course: str


class Templates(NamedTuple):
    """Sentences for each part of a note; the fillers `{age}`, `{sex}` and `{since}` are independent of the disease."""

    complaint: tuple[str, ...]
    examination: tuple[str, ...]
    diagnosis: tuple[str, ...]
    plan: tuple[str, ...]
    remark: tuple[str, ...]
    sex: tuple[str, ...]
    since: tuple[str, ...]


PART_ORDERS: tuple[tuple[str, ...], ...] = (
    ("complaint", "examination", "diagnosis", "plan"),
    ("complaint", "diagnosis", "examination", "plan"),
    ("complaint", "diagnosis", "plan", "examination"),
    ("diagnosis", "complaint", "examination", "plan"),
    ("examination", "complaint", "diagnosis", "plan"),
)

_ENGLISH_FACTS = """
hypertension | dizziness | tinnitus | fundoscopy | retinopathy | amlodipine | 5 mg | 8 weeks
asthma | wheezing | breathlessness | spirometry | obstruction | montelukast | 10 mg | 12 weeks
pneumonia | fever | cough | radiography | consolidation | amoxicillin | 500 mg | 7 days
diabetes | thirst | polyuria | glucometry | hyperglycaemia | metformin | 850 mg | 6 months
gout | podagra | redness | arthrocentesis | crystals | colchicine | 1 mg | 5 days
gastritis | heartburn | belching | gastroscopy | erosions | omeprazole | 20 mg | 6 weeks
anaemia | fatigue | pallor | haemogram | microcytosis | ferrous sulfate | 300 mg | 3 months
hypothyroidism | constipation | hoarseness | immunoassay | low thyroxine | levothyroxine | 50 mcg | 12 months
meningitis | headache | photophobia | lumbar puncture | pleocytosis | ceftriaxone | 2 g | 14 days
epilepsy | convulsions | blackouts | electroencephalography | spikes | carbamazepine | 200 mg | 2 years
cardiomyopathy | orthopnoea | oedema | echocardiography | hypokinesia | furosemide | 40 mg | 4 weeks
arrhythmia | palpitations | fainting | electrocardiography | fibrillation | rivaroxaban | 15 mg | 9 months
angina | chest pain | sweating | angiography | stenosis | clopidogrel | 75 mg | 12 months
tuberculosis | haemoptysis | emaciation | sputum microscopy | bacilli | isoniazid | 300 mg | 6 months
cystitis | dysuria | urgency | urinalysis | bacteriuria | nitrofurantoin | 100 mg | 5 days
nephrolithiasis | colic | haematuria | urography | hydronephrosis | tamsulosin | 400 mcg | 4 weeks
hyperthyroidism | tremor | irritability | scintigraphy | goitre | methimazole | 30 mg | 18 months
arthritis | stiffness | joint swelling | serology | autoantibodies | leflunomide | 20 mg | 24 weeks
osteoporosis | backache | kyphosis | densitometry | osteopenia | alendronate | 70 mg | 3 years
depression | sadness | insomnia | psychometry | anhedonia | sertraline | 50 mg | 9 months
parkinsonism | slowness | rigidity | tomography | dopamine deficit | levodopa | 125 mg | 5 years
urticaria | itching | wheals | skin testing | sensitization | cetirizine | 10 mg | 2 weeks
sinusitis | congestion | anosmia | rhinoscopy | suppuration | cefuroxime | 250 mg | 10 days
cholecystitis | jaundice | vomiting | ultrasonography | wall thickening | metronidazole | 400 mg | 8 days
"""

_CHINESE_FACTS = """
高血压 | 头晕 | 耳鸣 | 眼底照相 | 视网膜病变 | 氨氯地平 | 5毫克 | 8周
哮喘 | 喘息 | 气短 | 肺功能 | 气流阻塞 | 孟鲁司特 | 10毫克 | 12周
肺炎 | 发热 | 咳嗽 | 胸片 | 肺实变 | 阿莫西林 | 500毫克 | 7日
糖尿病 | 口渴 | 多尿 | 血糖测定 | 血糖升高 | 二甲双胍 | 850毫克 | 6个月
痛风 | 足趾痛 | 皮肤发红 | 关节穿刺 | 尿酸结晶 | 秋水仙碱 | 1毫克 | 5日
胃炎 | 烧心 | 嗳气 | 胃镜 | 黏膜糜烂 | 奥美拉唑 | 20毫克 | 6周
贫血 | 乏力 | 面色苍白 | 血常规 | 小红细胞 | 硫酸亚铁 | 300毫克 | 3个月
甲减 | 便秘 | 声音嘶哑 | 激素测定 | 甲状腺素低 | 左甲状腺素 | 50微克 | 12个月
脑膜炎 | 头痛 | 畏光 | 腰椎穿刺 | 白细胞增多 | 头孢曲松 | 2克 | 14日
癫痫 | 抽搐 | 意识丧失 | 脑电图 | 棘波 | 卡马西平 | 200毫克 | 2年
心肌病 | 端坐呼吸 | 水肿 | 心脏彩超 | 室壁运动减弱 | 呋塞米 | 40毫克 | 4周
心律失常 | 心悸 | 晕厥 | 心电图 | 房颤 | 利伐沙班 | 15毫克 | 9个月
心绞痛 | 胸痛 | 出汗 | 冠脉造影 | 血管狭窄 | 氯吡格雷 | 75毫克 | 12个月
肺结核 | 咯血 | 消瘦 | 痰涂片 | 抗酸杆菌 | 异烟肼 | 300毫克 | 6个月
膀胱炎 | 尿痛 | 尿急 | 尿液分析 | 菌尿 | 呋喃妥因 | 100毫克 | 5日
肾结石 | 腰部绞痛 | 血尿 | 尿路造影 | 肾积水 | 坦索罗辛 | 400微克 | 4周
甲亢 | 手抖 | 烦躁 | 核素扫描 | 甲状腺肿 | 甲巯咪唑 | 30毫克 | 18个月
关节炎 | 晨僵 | 关节肿胀 | 血清学 | 自身抗体 | 来氟米特 | 20毫克 | 24周
骨质疏松 | 背痛 | 驼背 | 骨密度 | 骨量减少 | 阿仑膦酸钠 | 70毫克 | 3年
抑郁症 | 情绪低落 | 失眠 | 心理测评 | 快感缺失 | 舍曲林 | 50毫克 | 9个月
帕金森病 | 动作迟缓 | 肌肉强直 | 脑断层显像 | 多巴胺缺乏 | 左旋多巴 | 125毫克 | 5年
荨麻疹 | 瘙痒 | 风团 | 皮肤试验 | 尘螨过敏 | 西替利嗪 | 10毫克 | 2周
鼻窦炎 | 鼻塞 | 嗅觉减退 | 鼻内镜 | 脓液 | 头孢呋辛 | 250毫克 | 10日
胆囊炎 | 黄疸 | 呕吐 | 腹部超声 | 囊壁增厚 | 甲硝唑 | 400毫克 | 8日
"""


def _rows(table: str) -> tuple[Facts, ...]:
    return tuple(Facts(*(cell.strip() for cell in line.split("|"))) for line in table.strip().splitlines())


FACTS: dict[Language, tuple[Facts, ...]] = {"zh": _rows(_CHINESE_FACTS), "en": _rows(_ENGLISH_FACTS)}

TEMPLATES: dict[Language, Templates] = {
    "en": Templates(
        complaint=(
            "A {sex}, {age}: {complaint} since {since}; then {sign}.",
            "A {sex}, {age}. Complaint: {complaint}, since {since}, then {sign}.",
            "Complaint: {complaint}; since {since}, also {sign}; a {sex}, {age}.",
            "Complaint, since {since}: {complaint}; then also {sign}, in a {sex}, {age}.",
        ),
        examination=(
            "Test: {examination}; found: {finding}.",
            "Test, {examination}, found then: {finding}.",
            "Found: {finding}; test: {examination}.",
            "Found, by test: {finding}, on {examination}.",
        ),
        diagnosis=(
            "Diagnosis: {disease}.",
            "Diagnosis, likely {disease}.",
            "Most likely: {disease}.",
            "Most likely {disease}, as before.",
        ),
        plan=(
            "Drug: {drug}; dose: {dose}; course: {course}.",
            "Course: {course}; drug: {drug}, dose: {dose}.",
            "Dose: {dose}; drug: {drug}, course: {course}.",
            "Drug, {drug}; each dose {dose}; course, {course}.",
        ),
        remark=("Drug and dose explained.", "Course explained.", "Test again then.", "No allergies."),
        sex=("man", "woman"),
        since=("Monday", "Tuesday", "Friday", "Sunday", "March", "June", "August", "December"),
    ),
    "zh": Templates(
        complaint=(
            "{sex}，{age}岁，主诉：{complaint}，已{since}，伴有：{sign}。",
            "{sex}{age}岁，主诉“{complaint}”，{since}；伴有“{sign}”。",
            "症状：{complaint}，已{since}，后有“{sign}”；{sex}，{age}岁。",
            "症状“{complaint}”，{since}，后有：{sign}；{sex}{age}岁。",
        ),
        examination=(
            "检查：{examination}；结果：{finding}。",
            "检查“{examination}”，结果“{finding}”。",
            "结果：{finding}；方法：{examination}。",
            "结果“{finding}”，方法“{examination}”。",
        ),
        diagnosis=(
            "诊断：{disease}。",
            "诊断“{disease}”。",
            "考虑：{disease}。",
            "考虑“{disease}”。",
        ),
        plan=(
            "处方：{drug}；剂量：每次{dose}；疗程：共{course}。",
            "处方“{drug}”，剂量：每次{dose}；疗程：连用{course}。",
            "疗程：共{course}；处方“{drug}”，剂量：每次{dose}。",
            "剂量：每次{dose}；处方：{drug}；疗程：连用{course}。",
        ),
        remark=("剂量勿自减。", "疗程勿中断。", "按时复诊。", "无过敏史。"),
        sex=("男性", "女性"),
        since=("两天", "三天", "五天", "半月", "一旬", "数天", "数月", "半年"),
    ),
}


Choice = TypeVar("Choice")
_WORD = 1 << 64
_DRAWS = 12  # more than a note takes
_YOUNGEST, _OLDEST = 18, 89


@dataclass(frozen=True)
class Note:
    """One synthetic clinical note."""

    text: str
    """The note, one line."""
    language: Language
    """`zh` at even positions, `en` at odd ones: equal shares at every even count."""
    facts: tuple[str, ...]
    """Its terms: disease, complaint, sign, examination, finding, drug, dose, course; each occurs once in `text`."""


def generate_notes(count: int, seed: int) -> Iterator[Note]:
    """Notes 0 to `count` - 1 of a seed (modulo 2**64), in order; a shorter corpus is a prefix of a longer one."""
    return (_note(seed, index) for index in range(count))


def clinical_terms() -> list[str]:
    """All terms of the notes without duplicates, in a fixed order: Chinese first, disease by disease."""
    return list(dict.fromkeys(term for rows in FACTS.values() for facts in rows for term in facts))


def _note(seed: int, index: int) -> Note:
    key = np.array([seed % _WORD, index], dtype=np.uint64)
    draws = iter(np.random.Philox(key=key).random_raw(_DRAWS).tolist())

    def pick(choices: Sequence[Choice]) -> Choice:  # the bias of a modulo is below 1e-17 here
        return choices[next(draws) % len(choices)]

    language: Language = "zh" if index % 2 == 0 else "en"
    templates = TEMPLATES[language]
    facts = pick(FACTS[language])
    parts = [getattr(templates, part) for part in pick(PART_ORDERS)]
    if next(draws) % 2 == 0:
        parts.append(templates.remark)
    fillers = {"age": _YOUNGEST + next(draws) % (_OLDEST - _YOUNGEST + 1), "sex": pick(templates.sex)}
    fillers["since"] = pick(templates.since)
    sentences = [pick(ways).format(**facts._asdict(), **fillers) for ways in parts]
    return Note(("" if language == "zh" else " ").join(sentences), language, tuple(facts))
