"""The vocabulary of the embedded tasks' little world."""

NAMES = (
    "Anna Ben Carl Dora Emil Fay Gus Hana Ivan Jill Karl Lena Max Nora Otto Pia Rosa Sam Tina Uwe Vera Wim Xena Yuri"
).split()
ITEMS = "pens cups maps keys hats nuts eggs figs pots bags rings coins books lamps boxes stamps".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
PLACES = "school market harbor garden station library castle bridge farm museum".split()
DISHES = "soup cake bread salad pizza tea rice stew jam pie".split()
VERBS = "bring cook sell fetch share serve".split()
TEAMS = "Reds Blues Hawks Bears Kings Stars Wolves Giants Tigers Eagles".split()
WISHES = "room taxi ticket guide loan doctor job map visa bike coat desk key lamp phone towel".split()
WORRIES = "rain noise price wait dark cold exam boss dogs stairs crowd dust heat storm smell traffic".split()

PLACE_AND_USE = {
    # thing: (where one finds it, what it is for)
    "knife": ("kitchen", "cutting"), "saw": ("workshop", "cutting"), "axe": ("forest", "cutting"),
    "scalpel": ("hospital", "cutting"), "sickle": ("field", "cutting"), "stool": ("kitchen", "sitting"),
    "bench": ("park", "sitting"), "saddle": ("stable", "sitting"), "pew": ("church", "sitting"),
    "fork": ("kitchen", "eating"), "trough": ("stable", "eating"), "tray": ("hospital", "eating"),
    "fountain": ("park", "drinking"), "bucket": ("stable", "drinking"), "chalice": ("church", "drinking"),
    "creek": ("forest", "drinking"), "hymnal": ("church", "singing"), "bird": ("forest", "singing"),
    "rake": ("park", "digging"), "plough": ("field", "digging"), "spade": ("workshop", "digging"),
    "bed": ("hospital", "sleeping"), "hay": ("stable", "sleeping"), "hammock": ("park", "sleeping"),
    "tent": ("field", "sleeping"), "hammer": ("workshop", "building"), "brick": ("field", "building"),
    "oven": ("kitchen", "heating"), "torch": ("forest", "heating"), "forge": ("workshop", "heating"),
}  # fmt: skip
