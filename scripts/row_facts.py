"""Hand-written facts behind data/alpaca_tiny.json: one block of text per topic.

    question | answer                 blocks of finished rows (GREETINGS, COLOURS ...)
    value | value | value             blocks of facts that make_rows.py puts into several phrasings

To teach the tiny model something new, add a line here, run `python scripts/make_rows.py`, then
`python scripts/build_tiny_checkpoint.py`.
"""


def table(text: str) -> list[list[str]]:
    """Turn a block of `a | b | c` lines into a list of rows; blank lines are skipped."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines() if line.strip()]


def words(text: str) -> list[str]:
    """The words of a block of text."""
    return text.split()


GREETINGS = table("""
你好 | 你好！有什么可以帮你的吗？
您好 | 你好！有什么可以帮你的吗？
你好！ | 你好！有什么可以帮你的吗？
嗨 | 你好！有什么可以帮你的吗？
早上好 | 早上好！祝你今天愉快。
早安 | 早上好！祝你今天愉快。
中午好 | 中午好！记得吃午饭。
下午好 | 下午好！今天过得怎么样？
晚上好 | 晚上好！今天过得怎么样？
晚安 | 晚安，做个好梦。
再见 | 再见，欢迎再来。
拜拜 | 再见，欢迎再来。
谢谢 | 不客气。
谢谢你 | 不客气。
非常感谢 | 不客气。
对不起 | 没关系。
不好意思 | 没关系。
很高兴认识你 | 我也很高兴认识你。
好久不见 | 好久不见！你最近好吗？
你好吗？ | 我很好，谢谢你。
最近怎么样？ | 我很好，谢谢你。
生日快乐 | 谢谢你！也祝你快乐。
新年快乐 | 新年快乐！祝你一切顺利。
我今天很开心 | 太好了，真为你高兴。
我今天很累 | 辛苦了，好好休息一下吧。
我饿了 | 那就去吃点东西吧。
我渴了 | 那就去喝点水吧。
我困了 | 那就早点睡觉吧。
祝你好运 | 谢谢你！也祝你好运。
明天见 | 明天见！
Hello | Hello! How can I help you?
Hello! | Hello! How can I help you?
Hi | Hello! How can I help you?
Hi there | Hello! How can I help you?
Hey | Hello! How can I help you?
Good morning | Good morning! Have a nice day.
Good morning! | Good morning! Have a nice day.
Good afternoon | Good afternoon! How is your day?
Good evening | Good evening! How was your day?
Good night | Good night, sleep well.
Goodbye | Goodbye, see you soon.
Bye | Goodbye, see you soon.
See you tomorrow | See you tomorrow!
Thank you | You are welcome.
Thanks | You are welcome.
Thanks a lot | You are welcome.
Thank you very much | You are welcome.
Sorry | No problem.
I am sorry | No problem.
Nice to meet you | Nice to meet you too.
How are you? | I am fine, thank you.
How are you today? | I am fine, thank you.
How is it going? | I am fine, thank you.
Happy birthday | Thank you! I wish you joy too.
Happy new year | Happy new year! I wish you all the best.
I am happy today | That is great to hear.
I am tired | Take a good rest.
I am hungry | Then have something to eat.
I am thirsty | Then drink some water.
Good luck | Thank you! Good luck to you too.
""")

# thing in Chinese | its colour | thing in English (with article) | its colour
COLOURS = table("""
晴天的天空 | 蓝色 | the sky on a clear day | blue
大海 | 蓝色 | the sea | blue
草 | 绿色 | grass | green
树叶 | 绿色 | a leaf | green
香蕉 | 黄色 | a banana | yellow
柠檬 | 黄色 | a lemon | yellow
向日葵 | 黄色 | a sunflower | yellow
雪 | 白色 | snow | white
牛奶 | 白色 | milk | white
盐 | 白色 | salt | white
煤 | 黑色 | coal | black
夜空 | 黑色 | the night sky | black
乌鸦 | 黑色 | a crow | black
血 | 红色 | blood | red
番茄 | 红色 | a tomato | red
草莓 | 红色 | a strawberry | red
胡萝卜 | 橙色 | a carrot | orange
橙子 | 橙色 | an orange | orange
茄子 | 紫色 | an eggplant | purple
葡萄 | 紫色 | a grape | purple
巧克力 | 棕色 | chocolate | brown
咖啡 | 棕色 | coffee | brown
大象 | 灰色 | an elephant | grey
老鼠 | 灰色 | a mouse | grey
桃花 | 粉色 | a peach blossom | pink
""")

CAPITALS = table("""
中国 | 北京 | China | Beijing
日本 | 东京 | Japan | Tokyo
韩国 | 首尔 | South Korea | Seoul
泰国 | 曼谷 | Thailand | Bangkok
越南 | 河内 | Vietnam | Hanoi
印度 | 新德里 | India | New Delhi
蒙古 | 乌兰巴托 | Mongolia | Ulaanbaatar
菲律宾 | 马尼拉 | the Philippines | Manila
土耳其 | 安卡拉 | Turkey | Ankara
俄罗斯 | 莫斯科 | Russia | Moscow
法国 | 巴黎 | France | Paris
德国 | 柏林 | Germany | Berlin
英国 | 伦敦 | the United Kingdom | London
意大利 | 罗马 | Italy | Rome
西班牙 | 马德里 | Spain | Madrid
葡萄牙 | 里斯本 | Portugal | Lisbon
希腊 | 雅典 | Greece | Athens
奥地利 | 维也纳 | Austria | Vienna
瑞典 | 斯德哥尔摩 | Sweden | Stockholm
挪威 | 奥斯陆 | Norway | Oslo
芬兰 | 赫尔辛基 | Finland | Helsinki
丹麦 | 哥本哈根 | Denmark | Copenhagen
波兰 | 华沙 | Poland | Warsaw
爱尔兰 | 都柏林 | Ireland | Dublin
埃及 | 开罗 | Egypt | Cairo
肯尼亚 | 内罗毕 | Kenya | Nairobi
加拿大 | 渥太华 | Canada | Ottawa
美国 | 华盛顿 | the United States | Washington
墨西哥 | 墨西哥城 | Mexico | Mexico City
古巴 | 哈瓦那 | Cuba | Havana
巴西 | 巴西利亚 | Brazil | Brasilia
秘鲁 | 利马 | Peru | Lima
智利 | 圣地亚哥 | Chile | Santiago
阿根廷 | 布宜诺斯艾利斯 | Argentina | Buenos Aires
澳大利亚 | 堪培拉 | Australia | Canberra
新西兰 | 惠灵顿 | New Zealand | Wellington
""")

# word | definition | word | definition
DEFINITIONS = table("""
字典 | 一种解释字词意思的书。 | a dictionary | A book that explains words.
地图 | 一种画出地方和道路的图。 | a map | A drawing of places and roads.
温度计 | 一种测量冷热的工具。 | a thermometer | A tool that measures how warm it is.
时钟 | 一种显示时间的工具。 | a clock | A tool that shows the time.
日历 | 一种显示日期的表。 | a calendar | A table that shows the dates.
雨伞 | 一种挡雨的工具。 | an umbrella | A tool that keeps off the rain.
图书馆 | 一个可以借书的地方。 | a library | A place where you can borrow books.
学校 | 一个学习知识的地方。 | a school | A place where people learn.
医院 | 一个给病人看病的地方。 | a hospital | A place where sick people get help.
博物馆 | 一个展出旧东西的地方。 | a museum | A place that shows old things.
餐厅 | 一个吃饭的地方。 | a restaurant | A place where you can eat.
老师 | 一个教别人知识的人。 | a teacher | A person who helps others learn.
医生 | 一个给人看病的人。 | a doctor | A person who treats the sick.
农民 | 一个种田的人。 | a farmer | A person who grows food.
厨师 | 一个做饭的人。 | a cook | A person who makes food.
作家 | 一个写书的人。 | a writer | A person who writes books.
苹果 | 一种水果。 | an apple | A kind of fruit.
桃子 | 一种水果。 | a peach | A kind of fruit.
白菜 | 一种蔬菜。 | a cabbage | A kind of vegetable.
土豆 | 一种蔬菜。 | a potato | A kind of vegetable.
猫 | 一种动物。 | a cat | A kind of animal.
狗 | 一种动物。 | a dog | A kind of animal.
鱼 | 一种生活在水里的动物。 | a fish | An animal that lives in water.
鸟 | 一种有翅膀的动物。 | a bird | An animal with wings.
玫瑰 | 一种花。 | a rose | A kind of flower.
钢琴 | 一种乐器。 | a piano | A musical instrument.
自行车 | 一种有两个轮子的车。 | a bicycle | A vehicle with two wheels.
飞机 | 一种在天上飞的交通工具。 | a plane | A machine that flies in the air.
电脑 | 一种处理数据的机器。 | a computer | A machine that processes data.
太阳 | 一颗发光发热的恒星。 | the sun | A star that gives light and heat.
月亮 | 地球的卫星。 | the moon | The satellite of the earth.
冰 | 冻成固体的水。 | ice | Water that has frozen.
雨 | 从云里落下的水。 | rain | Water that falls from clouds.
早饭 | 早上吃的饭。 | breakfast | The meal eaten in the morning.
晚饭 | 晚上吃的饭。 | dinner | The meal eaten in the evening.
语言模型 | 一种学习文字的程序。 | a language model | A program that learns from text.
""")

OPPOSITES = table("""
大 | 小 | big | small
高 | 低 | high | low
长 | 短 | long | short
多 | 少 | many | few
快 | 慢 | fast | slow
冷 | 热 | cold | hot
新 | 旧 | new | old
好 | 坏 | good | bad
早 | 晚 | early | late
轻 | 重 | light | heavy
远 | 近 | far | near
黑 | 白 | black | white
上 | 下 | up | down
左 | 右 | left | right
前 | 后 | front | back
里 | 外 | inside | outside
开 | 关 | open | closed
胖 | 瘦 | fat | thin
强 | 弱 | strong | weak
深 | 浅 | deep | shallow
干 | 湿 | dry | wet
软 | 硬 | soft | hard
甜 | 苦 | sweet | bitter
真 | 假 | true | false
买 | 卖 | buy | sell
来 | 去 | come | go
进 | 出 | in | out
哭 | 笑 | cry | laugh
贵 | 便宜 | expensive | cheap
安静 | 吵闹 | quiet | noisy
容易 | 困难 | easy | difficult
干净 | 肮脏 | clean | dirty
成功 | 失败 | success | failure
开始 | 结束 | begin | end
白天 | 黑夜 | day | night
""")

DAYS = table("""
星期一 | Monday
星期二 | Tuesday
星期三 | Wednesday
星期四 | Thursday
星期五 | Friday
星期六 | Saturday
星期日 | Sunday
""")

MONTHS = table("""
一月 | January
二月 | February
三月 | March
四月 | April
五月 | May
六月 | June
七月 | July
八月 | August
九月 | September
十月 | October
十一月 | November
十二月 | December
""")

CALENDAR = table("""
一个星期有几天？ | 七天。
一年有几个月？ | 十二个月。
一天有多少个小时？ | 二十四个小时。
一个小时有多少分钟？ | 六十分钟。
一分钟有多少秒？ | 六十秒。
一年有几个季节？ | 四个。
一年有哪四个季节？ | 春天、夏天、秋天和冬天。
一年的第一个月是哪个月？ | 一月。
一年的最后一个月是哪个月？ | 十二月。
周末是哪两天？ | 星期六和星期日。
How many days are there in a week? | Seven.
How many months are there in a year? | Twelve.
How many hours are there in a day? | Twenty-four.
How many minutes are there in an hour? | Sixty.
How many seconds are there in a minute? | Sixty.
How many seasons are there in a year? | Four.
What are the four seasons? | Spring, summer, autumn and winter.
What is the first month of the year? | January.
What is the last month of the year? | December.
Which two days are the weekend? | Saturday and Sunday.
""")

# Names for the reading rows: they let the model practise copying letters and characters it is given.
NAMES_ZH = words("""
小星 小明 小红 小刚 小丽 小雨 小雪 小云 小海 小山 小虎 小燕 阿福 阿宝 阿德 阿莲 大伟 大勇
志强 建国 美玲 晓东 晓春 文静 文博 子涵 子轩 雨桐 天宇 佳佳 婷婷 乐乐 明月 星河 思远 思源 知行 若水 静秋 平安
""")
NAMES_EN = words("""
Nova Luna Star Robin Alice Bob Carol David Emma Frank Grace Henry Iris Jack Kate Leo Mary Nick Olivia Peter
Quinn Rose Sam Tina Uma Victor Wendy Xena Yuki Zoe Echo Atlas Spark Pixel Comet Felix Ruby Oscar Hugo Stella
""")
