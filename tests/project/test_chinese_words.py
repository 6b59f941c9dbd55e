"""One word for one thing: the glossary decides, and no Chinese text uses a second word for it."""

import re

import chinese_edition as edition
import pytest

# Anchor of GLOSSARY.md, whose Chinese word is the one to use -> other words for the same thing, as a pattern.
SECOND_WORDS = {
    "token": r"令牌|标记符|记号|字元|(?<![\w/（(·-])tokens?(?!\w)",
    "tokenizer": "标记器|标记化|分词程序|词法分析器",
    "piece": "(?<!子)词片|子词单元",
    "vocabulary": "词汇表|字汇|单词表",
    "embedding": "词向量|嵌入层|内嵌",
    "hidden-states": "隐状态|隐含状态|隐层|隐向量",
    "block": "(?:[Tt]ransformer|模型|残差|注意力|重计算的|每个|某个|一个)块",
    "attention": "关注力|注意机制|自关注",
    "residual": "残差链接|跳跃连接|跳连|捷径",
    "norm": "规范化|标准化|正规化|正则化",
    "head": "语言模型头|预测头|输出层",
    "tied": "绑定|捆绑|权值共享|共享权重",
    "logit": "对数几率|逻辑值",
    "mask": "遮罩|蒙版|掩膜|掩蔽|遮挡",
    "position": "位置嵌入|位置向量",
    "rotary": "旋转位置嵌入|旋转嵌入|旋转编码",
    "checkpoint": "存档点|快照|检查站",
    "shard": "切片|分卷",
    "offset": "偏移(?!量)|位移",
    "prompt": "提示语|提示文本|提示句|提示字",
    "row": "数据条|记录行",
    "example": "样例|示例行",
    "batch": "批量|批处理|批大小|小批",
    "loss": "损耗|代价函数|损失值",
    "label": "标注数据|打标",
    "padding": "补齐(?!，这叫)|补零到|补白",
    "split": "拆分|分拆|切口|切分点|切分位置|分割点",
    "device-map": "设备图|设备地图|装置映射",
    "stage": "级段|流水级|流水段",
    "micro-batch": "微批(?!次)|微小批|微型批|迷你批",
    "pipeline": "管道|管线|流水作业",
    "bubble": "泡沫|空泡",
    "activation-checkpointing": "梯度检查点|激活检查点|重新物化|检查点(?:技术|机制)",
    "optimizer-state": "优化程序|最优化器",
    "kernel": "内核函数|算子|核程序|GPU 内核",
    "gpu-memory": "GPU ?内存|显卡内存|视频内存",
    "slack": "松弛|裕量|冗余量",
    "workspace": "工作空间",
    "context": "CUDA 环境|语境",
    "throughput": "吞吐率|通量|吞吐(?!量)",
    "lora": "低阶适配|低秩(?:自)?适应",
    "adapter": "适配层|转接器|适应器|配接器",
    "rank": "阶数|等级",
    "dropout": "丢弃法|丢弃率|暂退",
    "warmup": "热身|暖启动|升温",
    "loss-scale": "损失放缩|损失标度",
    "base": "底座|基础模型|基模型|底模",
    "interference": "灾难性遗忘|串扰",
    "perplexity": "迷惑度|混乱度",
    "greedy": "贪婪|贪心搜索|贪心法",
    "temperature": "温度系数",
    "key-value-cache": "键值缓存|键-值|(?i:kv[ -]?cache)",
    "cuda-graph": r"CUDA [Gg]raphs?(?!\w)|CUDA 图形",
    "process-rank": "秩号|进程排名",
    "rendezvous": "集合点|汇合|集结",
    "backend": "后台库|通讯后端",
    "ddp": "数据平行|资料并行",
    "tensor-parallel": "张量平行",
    "interleaved": "交织|穿插",
}
# Words that no entry of the glossary is about.
ELSEWHERE = "笔记本(?!电脑)|答复|应答|精调|细调|微调整|缺省|代码格|学习速率|训练集群|软体|程式|支援|资料集|记忆体"

ENTRIES = {
    anchor: (entry["chinese"], entry["said"])
    for anchor, entry in (
        (anchor, edition.ENTRY.search(text))
        for anchor, text in re.findall(
            r'<a id="([\w-]+)"></a>(.*?)(?=<a id=|\Z)', (edition.PROJECT / "GLOSSARY.md").read_text("utf-8"), re.DOTALL
        )
    )
}


def chinese_texts():
    """(where, text without code, addresses and tags) of every translation."""
    for name in [*edition.sources(), edition.FIGURES]:
        catalog = edition.read_catalog(edition.catalog_path(name, edition.PROJECT))
        for text in edition.translations(catalog).values():
            yield f"locale/zh_CN/{name}.po", re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>", "", text)
    for anchor, (_, said) in ENTRIES.items():
        yield f"GLOSSARY.md#{anchor}", re.sub(r"`[^`]*`|\*[^*]*\*", "", said)


TEXTS = list(chinese_texts())


@pytest.mark.parametrize("anchor", SECOND_WORDS)
def test_no_text_has_a_second_word(anchor):
    word, _ = ENTRIES[anchor]
    for where, text in TEXTS:
        other = re.search(SECOND_WORDS[anchor], text)
        shown = other and text[max(0, other.start() - 15) : other.end() + 15].replace("\n", " ")
        assert not other, f"{where}: {other[0]} in “{shown}”: the glossary says {word}"


def test_no_text_has_words_of_other_places():
    for where, text in TEXTS:
        assert not (other := re.search(ELSEWHERE, text)), f"{where}: {other[0]}"


def test_the_glossary_obeys_itself():
    """The word that it decides on is none of the second words; only in brackets behind it may one stand."""
    for anchor, pattern in SECOND_WORDS.items():
        word = re.sub(r"（.*?）", "", ENTRIES[anchor][0])
        assert not re.search(pattern, word) or word.isascii(), anchor
