"""Measure how well the tool teaches a product catalogue, and how fast it reads a huge one. A benchmark, not a test.

    python tests/bench_knowledge.py MODEL OUTPUT_DIR                                # 2,000 rows, until it stops
    python tests/bench_knowledge.py MODEL OUTPUT_DIR --steps 60 -- --overwrite      # flags of the script after "--"
    python tests/bench_knowledge.py --make catalogue.jsonl --rows 2000 --seed 0     # only write the catalogue
    python tests/bench_knowledge.py --huge huge.jsonl                               # 1.3 million rows, 2 GB

MODEL is a folder or a name on the Hub. The run is the user's own command in a process of its own, and the figures are
those of its report. The catalogue is generated: brands, towns and products are invented. What a product is made of,
what it can do, where its brand is at home and how long the warranty lasts follow from brand, type and size, and can be
learnt from the other rows; weight, item number and order of the sentences cannot. The huge file is written unless it
is there already, and is then read by a fresh process, whose seconds and peak memory are shown.
"""

import argparse
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "rename_obrutai.py"
QUESTION = "Describe this product: {title}"
COLUMNS = {"before": "base", "before_rows": "base with rows", "tuned": "tuned", "tuned_rows": "tuned with rows"}
FIGURES = ("loss", "chrf", "rare", "fluency", "ended", "tokens")
HUGE_ROWS = 1_300_000
HUGE_BLOCK = 1470  # characters of running text; with title and keys a row has about 1.5 KB

# ---- Catalogue ----------------------------------------------------------------------------------------------
# brand = home town; founded; years of warranty; what it is known for

BRANDS = """
Brellan = Harrowmere; 1921; 5; tools that can be repaired at home
Morvik = Stenholt; 1958; 3; plain shapes and quiet motors
Tessary = Vale Orrin; 1974; 2; careful stitching and soft edges
Kandrow = Port Ashby; 1937; 10; parts that outlive the box they came in
Ulvane = Lower Tressel; 1989; 2; light frames and clever hinges
Quillmar = Saint Odren; 2003; 4; cheerful colours at a fair price
Hestby = Norrabrook; 1946; 7; heavy steel and simple screws
Dravick = Colder Quay; 1912; 15; a finish that ages well
Lumbry = Ferndown Cross; 1995; 3; wood from its own forest
Ventoro = Casale Brin; 1966; 2; smooth curves and good grips
Sarkell = Mount Hale; 1981; 6; gear that is tested in bad weather
Ombrey = Little Dunmarsh; 2010; 3; recycled material throughout
Fennick = Oakhurst Bay; 1953; 8; spare parts for every model since the first
Tallowby = Great Wenning; 1899; 12; hand-finished details
Wexmarrow = Isle of Corrow; 1970; 5; things that do not rust by the sea
Jorvale = Upper Lindmoor; 1964; 4; compact designs for small rooms
Astrelle = Montclair-sur-Vey; 1985; 2; a narrow, elegant line
Pindero = Rio Calvero; 1998; 3; honest kitchen goods
Galdwin = Eastmere; 1928; 9; solid joints without glue
Noctiva = Brightwell Sound; 2015; 1; low power use
"""

GRAMS = {"cordless drill": 1500, "desk lamp": 1800, "rucksack": 900, "frying pan": 1400, "kettle": 1100,
         "office chair": 14000, "rain jacket": 420, "folding table": 7500, "wall clock": 1200, "bicycle helmet": 310,
         "vacuum flask": 380, "bookshelf": 16000, "blender": 3200, "sleeping bag": 1300, "toolbox": 2600,
         "garden hose": 3400, "radio": 950, "chef's knife": 210}

# Per type: sizes, each with what follows from it; materials; features; uses; care; what is in the box.
TYPES = {
    "cordless drill": (
        {"12 V": "At 12 V it is made for furniture and light repairs", "18 V": "At 18 V it goes through hardwood",
         "36 V": "With 36 V it also takes on brick"},
        "glass-filled nylon|die-cast magnesium|impact-proof plastic",
        "a keyless chuck of 13 mm|two gears and 21 torque settings|a brushless motor that hardly warms up|a small "
        "lamp above the trigger|a belt clip that fits left or right|a brake that stops the bit at once",
        "hanging shelves and building decks|screwing cabinets together|repairs around the house",
        "Blow the dust out of the vents after work|Keep the battery at half charge over the winter",
        "one battery, a charger and a case|two batteries and a quick charger|a charger and ten bits"),
    "desk lamp": (
        {"40 cm": "At 40 cm it fits under a shelf", "55 cm": "At 55 cm it lights a whole desk",
         "70 cm": "At 70 cm it reaches over two screens"},
        "brushed aluminium|powder-coated steel|birch plywood",
        "three shades of white|a dimmer in the foot|a joint that stays where you leave it|a socket for charging a "
        "telephone|a shade that does not dazzle|a timer that switches it off after an hour",
        "reading late without waking anybody|drawing and fine work|long evenings at the computer",
        "Wipe the shade with a dry cloth|Let it cool before you fold it",
        "a bulb and two metres of cable|a clamp and a heavy foot|a bulb that lasts 15,000 hours"),
    "rucksack": (
        {"18 l": "With 18 litres it is right for a day out", "28 l": "Its 28 litres hold enough for a weekend",
         "45 l": "With 45 litres it carries a week's clothes"},
        "waxed cotton|recycled polyester|ripstop nylon",
        "a padded sleeve for a laptop|a chest strap with a whistle|side pockets that stretch|a rain cover in the base|"
        "an airy back panel|zips that run smoothly in the cold",
        "walks in the hills|the daily way to work|travelling with hand luggage only",
        "Wash it by hand and dry it in the shade|Brush off dry mud before you store it",
        "a rain cover and a key ring|a small pouch for cables|a hip belt that comes off"),
    "frying pan": (
        {"20 cm": "The 20 cm base is enough for two eggs", "24 cm": "A 24 cm base feeds two",
         "28 cm": "The 28 cm base takes four steaks"},
        "cast iron|forged aluminium|three-layer steel",
        "a handle that stays cool|a rim that pours without dripping|a coating free of PFAS|a base for induction|"
        "rivets that never work loose|a second handle opposite the first",
        "searing meat and fish|pancakes on Sunday|slow sauces",
        "Rub it with a little oil after washing|Do not put it into the dishwasher",
        "a felt disc for stacking|a leaflet with twelve recipes|a glass lid"),
    "kettle": (
        {"1.0 l": "One litre boils in under three minutes", "1.5 l": "Its 1.5 litres fill six cups",
         "1.7 l": "With 1.7 litres it serves a full table"},
        "stainless steel|borosilicate glass|double-walled plastic",
        "a lid that opens with one thumb|four temperatures for tea and coffee|a filter you can rinse|a window that "
        "shows the level|a spout for slow pouring|a base that lets it turn all the way round",
        "tea at the right heat|pour-over coffee|quick soups at the office",
        "Descale it once a month with vinegar|Empty it when you go away",
        "a base and a spare filter|a measuring spoon|a cloth and a descaling sachet"),
    "office chair": (
        {"low back": "The low back suits a short day at the desk", "mid back": "The mid back holds you up to the "
         "shoulder blades", "high back": "The high back carries the neck as well"},
        "woven mesh|wool felt|soft vegan leather",
        "arms that move four ways|a seat that slides forward|a tilt that follows your weight|castors for hard floors|"
        "a gas lift with a wide range|a cushion for the small of the back",
        "long days of writing|home offices|rooms shared by several people",
        "Vacuum the seat now and then|Tighten the screws once a year",
        "an Allen key and six screws|a set of soft castors|a headrest to add later"),
    "rain jacket": (
        {"S": "Size S is cut close to the body", "M": "Size M leaves room for a jumper",
         "L": "Size L goes over a thick fleece", "XL": "Size XL is long in the back"},
        "laminated polyamide|oiled cotton|recycled ripstop",
        "taped seams|a hood that follows the head|vents under the arms|cuffs with a tab|a two-way zip|a peak "
        "stiff enough for strong wind",
        "cycling through autumn|windy days at the coast|walking the dog in any weather",
        "Wash it at 30 degrees without softener|Proof it again after ten washes",
        "a stuff sack|a repair patch in the same fabric|a loop for hanging it up"),
    "folding table": (
        {"80 cm": "At 80 cm it seats two", "120 cm": "At 120 cm four people have room",
         "180 cm": "Its 180 cm are enough for a buffet"},
        "bamboo|laminated beech|moulded polyethylene",
        "legs that lock with a click|a carrying handle|feet for uneven ground|a top that takes hot pots|rounded "
        "corners|hinges that do not pinch",
        "camping and garden parties|markets and fairs|a guest more than planned",
        "Wipe it dry before you fold it|Oil the hinges in spring",
        "a shoulder bag|four rubber caps|a strap that keeps it shut"),
    "wall clock": (
        {"25 cm": "At 25 cm it suits a kitchen", "35 cm": "At 35 cm it is easy to read across a room",
         "50 cm": "Its 50 cm fill an empty wall"},
        "solid oak|spun brass|painted steel",
        "hands that move without a tick|a glass that does not reflect|numerals in relief|a radio signal that sets it|"
        "a second hand that sweeps|a hook that hides behind the rim",
        "quiet bedrooms|classrooms and halls|a calm place above the sofa",
        "Change the battery once a year|Dust it with a soft brush",
        "a battery and a screw|a paper template for the wall|a spare pair of hands"),
    "bicycle helmet": (
        {"S/M": "S/M fits heads of 52 to 57 cm", "L/XL": "L/XL fits heads of 58 to 62 cm"},
        "in-mould foam|cork and foam|a double polycarbonate shell",
        "a wheel at the back for the fit|sixteen vents|a buckle that closes with one hand|a red light behind|pads "
        "that come out for washing|a net against insects",
        "the way to school|fast road rides|forest tracks",
        "Replace it after a fall|Wash the pads by hand",
        "a second set of pads|a bag of cotton|a clip-on visor"),
    "vacuum flask": (
        {"0.35 l": "At 0.35 litres it slips into a coat pocket", "0.5 l": "Half a litre is right for one long morning",
         "1.0 l": "One litre keeps a small party warm"},
        "double-walled steel|steel with a ceramic lining|titanium",
        "a cup as a lid|a stopper that pours while closed|a ring to carry it by|a mouth wide enough for ice|a seal "
        "that holds upside down|a base that does not scratch",
        "coffee on the train|soup on a winter walk|cold water at the beach",
        "Leave it open to dry|Clean the seal with a soft brush",
        "a cleaning brush|two cups|a sleeve of felt"),
    "bookshelf": (
        {"two tiers": "Two tiers fit below a window", "four tiers": "Four tiers hold about a hundred books",
         "six tiers": "Six tiers reach up to the ceiling of most rooms"},
        "solid pine|oak veneer|bent steel",
        "shelves that move in steps of 3 cm|a back panel that stiffens it|feet that level out|edges without sharp "
        "corners|slots that need no tools|a rail that keeps books from falling",
        "living rooms full of paperbacks|children's rooms|files and folders",
        "Screw it to the wall|Oil the wood every second year",
        "wall brackets and screws|eight shelf pins|a pair of bookends"),
    "blender": (
        {"500 W": "With 500 W it is at its best with soft fruit", "900 W": "Its 900 W crush ice",
         "1400 W": "With 1400 W it even makes nut butter"},
        "heat-proof glass|tough copolyester|brushed steel",
        "six blades in two levels|a pulse key|a lid with a measuring cap|a program for soup|feet that grip the table|"
        "a jug that locks in any direction",
        "smoothies before work|creamy soups|baby food",
        "Rinse it at once, then run it with warm water|Dry the blades before you put them away",
        "a tamper and a recipe book|two travel cups|a spare seal"),
    "sleeping bag": (
        {"+10 °C": "Comfortable down to +10 °C, it is for summer nights",
         "0 °C": "Comfortable down to 0 °C, it covers three seasons",
         "-10 °C": "Comfortable down to -10 °C, it is made for snow"},
        "duck down|hollow synthetic fibre|recycled microfibre",
        "a two-way zip|a collar that keeps the warmth in|a pocket for a watch|a hood with one cord|room for the knees|"
        "a loop for airing it",
        "light tents and long tours|festivals|nights in mountain huts",
        "Store it loose, never in its sack|Wash it once a season with special soap",
        "a compression sack|a cotton liner|a net for storage"),
    "toolbox": (
        {"13 inch": "At 13 inches it takes the tools for a bicycle",
         "19 inch": "At 19 inches a hammer and a saw fit in", "26 inch": "Its 26 inches swallow a spirit level"},
        "folded sheet steel|reinforced polypropylene|birch ply with steel corners",
        "a tray that lifts out|latches that close with gloves on|a groove for sawing pipes|bins for screws in the lid|"
        "a handle that lies flat|an eye for a padlock",
        "plumbers and electricians|the boot of a car|a tidy workshop",
        "Grease the latches now and then|Keep a bag of silica inside",
        "two padlock eyes|twelve small bins|a foam insert to cut to shape"),
    "garden hose": (
        {"15 m": "Its 15 metres are enough for a terrace", "25 m": "With 25 metres it reaches round a house",
         "50 m": "At 50 metres it waters a whole orchard"},
        "three-layer rubber|braided vinyl|food-safe polyurethane",
        "couplings of brass|a weave that does not kink|a nozzle with seven patterns|a shut-off at the hand|a skin "
        "that stands the sun|a burst pressure of 24 bar",
        "beds and lawns|washing the car|filling a pool",
        "Drain it before the first frost|Roll it up in wide loops",
        "a nozzle and two couplings|a wall holder|a tap adapter"),
    "radio": (
        {"pocket": "In the pocket size it runs on two small batteries", "tabletop": "The tabletop size has the deeper "
         "sound", "workshop": "The workshop size stands dust and knocks"},
        "walnut veneer|rubber and steel|linen and plastic",
        "ten keys for your stations|a dial that glows softly|digital and FM reception|an alarm that gets louder by "
        "and by|a headphone socket|an aerial that folds away",
        "news at breakfast|music in the garage|evenings on the balcony",
        "Wipe it with a dry cloth|Take the batteries out in storage",
        "a mains adapter|a wrist strap|a cable for older players"),
    "chef's knife": (
        {"16 cm": "A 16 cm blade is handy in a small kitchen", "20 cm": "The 20 cm blade does nearly everything",
         "24 cm": "A 24 cm blade goes through a melon in one stroke"},
        "carbon steel|Damascus steel of 33 layers|stainless steel with molybdenum",
        "a bolster shaped for the finger|an edge of 15 degrees|a full tang|hollows that let slices fall off|a handle "
        "that is safe when wet|a balance point right at the grip",
        "herbs and onions|boning and carving|sushi at home",
        "Wash it by hand and dry it at once|Hone it before each use",
        "a sheath of beech|a whetstone|a gift box"),
}
COLOURS = "blue black white green red grey yellow orange sand navy".split()
OPENERS = ("The {brand} {type} in {colour} is made for {use}.", "This {type} by {brand} is meant for {use}.",
           "Looking for {article} {type} for {use}? {brand} has one in {colour}.",
           "{brand} made this {colour} {type} with {use} in mind.",
           "For {use}, {brand} offers this {type} in {colour}.",
           "Meet the {colour} {type} from {brand}, made for {use}.")
BODIES = ("It is made of {material}.", "The material is {material}.", "{brand} makes it of {material}.",
          "{Material} gives it a long life.")
DETAILS = ("It has {a} and {b}.", "You get {a}, and {b} as well.", "{A} and {b} make it pleasant to use.",
           "Among its details are {a} and {b}.")
MORE = ("It comes with {a}, too.", "One more thing: {a}.", "It has {a} as well.", "Worth a mention: {a}.")
HOMES = ("{brand} has been at home in {town} since {year} and is known for {fame}.",
         "The firm, founded in {town} in {year}, is known for {fame}.",
         "Designed in {town}, where {brand} has stood for {fame} since {year}.")
WARRANTIES = ("The warranty lasts {years}.", "{brand} gives a warranty of {years}.", "It is covered for {years}.")
BOXES = ("In the box: {box}.", "Included: {box}.", "It is delivered with {box}.")
FACTS = ("It weighs {weight}; item number {item}.", "Weight {weight}, item {item}.",
         "Item {item} weighs {weight}.", "Order it as number {item}. Weight: {weight}.")


def brand_table():
    """name: (town, year, years of warranty, what it is known for)"""
    entries = (line.split(" = ") for line in BRANDS.strip().splitlines())
    return {name: tuple(fact.strip() for fact in facts.split(";")) for name, facts in entries}


def capital(text):
    return text[0].upper() + text[1:]


def product(kind, brand, facts, size, colour, rng):
    """(title, content) of one product. What follows from brand and type is drawn with a seed of their own."""
    sizes, *pools = TYPES[kind]
    materials, features, uses, care, boxes = (pool.split("|") for pool in pools)
    (town, year, years, fame), grams = facts, GRAMS[kind] * rng.uniform(0.6, 1.6)
    own = random.Random(f"{brand}/{kind}")
    material, use, box, advice = own.choice(materials), own.choice(uses), own.choice(boxes), own.choice(care)
    a, b, another = own.sample(features, 3)
    title = f"{brand} {kind} {size}, {colour}"
    slots = {
        "title": title, "type": kind, "article": "an" if kind[0] in "aeiou" else "a", "brand": brand, "use": use,
        "colour": colour, "material": material, "Material": capital(material), "a": a, "b": b, "A": capital(a),
        "town": town, "year": year, "fame": fame, "box": box, "years": f"{years} year" + "s" * (years != "1"),
        "weight": f"{grams / 1000:.1f} kg" if grams > 1000 else f"{grams:.0f} g",
        "item": f"{rng.choice('ABCDEFGHKLMNPRSTVWXZ')}{rng.randint(10000, 99999)}"}

    def one_of(patterns, **more):
        return rng.choice(patterns).format(**slots | more)

    details = one_of(DETAILS) + (" " + one_of(MORE, a=another) if rng.random() < 0.5 else "")
    middle = [one_of(BODIES), details, sizes[size] + "."]
    rng.shuffle(middle)
    ending = [text for text, chance in ((one_of(HOMES), 0.7), (one_of(WARRANTIES), 0.8), (one_of(BOXES), 0.5),
                                        (advice + ".", 0.4)) if rng.random() < chance]
    rng.shuffle(ending)
    if len(" ".join(middle + ending).split()) > 85:
        ending.pop()
    return title, " ".join([one_of(OPENERS), *middle, *ending, one_of(FACTS)])


def catalogue(rows, seed):
    """`rows` different products as (title, content), in random order."""
    rng, brands = random.Random(f"{seed}/catalogue"), brand_table()
    everything = [(kind, brand, size, colour) for kind, (sizes, *_) in TYPES.items() for brand in brands
                  for size in sizes for colour in COLOURS]
    if rows > len(everything):
        raise SystemExit(f"{len(everything)} different products at most, not {rows}.")
    return [product(kind, brand, brands[brand], size, colour, rng)
            for kind, brand, size, colour in rng.sample(everything, rows)]


def write_catalogue(path, rows, seed):
    with path.open("w", encoding="utf-8") as file:
        for title, content in catalogue(rows, seed):
            file.write(json.dumps({"title": title, "content": content}, ensure_ascii=False) + "\n")


# ---- Huge file ----------------------------------------------------------------------------------------------

def write_huge(path, rows, seed):
    """Rows of about 1.5 KB: a title of its own, one of a few hundred blocks of text, and a number at its end. About
    one in 200 is one of those that have to be left out or cleaned."""
    products = catalogue(3000, seed)
    texts = iter([content for _, content in products])
    blocks = []
    for text in texts:
        while len(text) < HUGE_BLOCK and (following := next(texts, None)):
            text += " " + following
        blocks.append(json.dumps(text[:HUGE_BLOCK], ensure_ascii=False)[1:-1])
    titles = [json.dumps(title, ensure_ascii=False)[1:-1] for title, _ in products]
    with path.open("w", encoding="utf-8", buffering=2**22) as file:
        for number in range(rows):
            title = f"{titles[number % len(titles)]}, lot {number}"
            content = f'"{blocks[number % len(blocks)]} Lot {number}."'
            if number % 997 == 1:
                content = "null"
            elif number % 1009 == 2:
                content = f'"{title}"'
            elif number % 1013 == 3:
                content = "NaN"
            elif number % 1019 == 4:
                content = f'"<p>{content[1:-1]}</p>&nbsp;<br/>\\u0007"'
            elif number % 1021 == 5:
                title = ""
            file.write(f'{{"title": "{title}", "content": {content}}}\n')


READER = """
import resource, sys, time
start = time.monotonic()
import rename_obrutai
settings = rename_obrutai.parse_settings(["--knowledge-file", sys.argv[1]])
imported, used = time.monotonic(), time.process_time()
rename_obrutai.read_knowledge(settings)
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
print(imported - start, time.monotonic() - imported, time.process_time() - used, peak)
"""


def read_huge(path):
    """What a fresh process needs to read the file: seconds of the import, seconds and processor seconds of the
    reading, bytes at the peak."""
    done = subprocess.run([sys.executable, "-c", READER, str(path)], cwd=SCRIPT.parent, capture_output=True,
                          text=True, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return tuple(float(figure) for figure in done.stdout.split()[-4:])


def bench_huge(path, rows, seed):
    if path.exists():
        print(f"{path} is there already: only read", flush=True)
    else:
        start = time.monotonic()
        write_huge(path, rows, seed)
        print(f"{rows:,} rows written in {time.monotonic() - start:.0f} s", flush=True)
    imported, read, used, peak = read_huge(path)
    print(f"{path.stat().st_size / 1e9:.2f} GB: import {imported:.1f} s, reading {read:.1f} s ({used:.1f} s of the "
          f"processor), peak memory {peak / 1e6:.0f} MB")


# ---- Run ----------------------------------------------------------------------------------------------------

def run_tool(model, output, knowledge, steps, extra):
    """The user's own command; its exit status and seconds."""
    own = {"--model-path": str(Path(model).resolve()) if Path(model).exists() else model,
           "--knowledge-file": str(knowledge), "--knowledge-question": QUESTION, "--output-dir": str(output)}
    if steps is not None:
        own["--knowledge-steps"] = str(steps)
    given = {flag.split("=")[0] for flag in extra}
    command = [sys.executable, str(SCRIPT)]
    command += [word for flag, value in own.items() if flag not in given for word in (flag, value)] + extra
    print(shlex.join(command), flush=True)
    start = time.monotonic()
    return subprocess.run(command).returncode, time.monotonic() - start


def table(scores):
    """The figures of the exam as markdown, a column per way to answer."""
    columns = [column for column in COLUMNS if column in scores]
    lines = ["| | " + " | ".join(COLUMNS[column] for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for figure in FIGURES:
        cells = [scores[column].get(figure) for column in columns]
        lines.append(f"| {figure} | " + " | ".join("-" if cell is None else f"{cell:.4g}" for cell in cells) + " |")
    return "\n".join(lines)


def bench(options, extra):
    output = options.output.resolve()
    with tempfile.TemporaryDirectory(prefix="bench_knowledge_") as folder:
        knowledge = Path(folder) / "catalogue.jsonl"
        write_catalogue(knowledge, options.rows, options.seed)
        status, seconds = run_tool(options.model, output, knowledge, options.steps, extra)
    print(f"\nexit status {status}, {seconds:.0f} s, {options.rows} rows\n")
    if not (output / "report.json").is_file():
        raise SystemExit(f"No report in {output}.")
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    print(table(report["knowledge"]["scores"]))
    retention = report["scores"].get("pass_2", {}).get("retention")
    print("\nretention on everyday text: " + ("-" if retention is None else f"{retention:.4f}"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("output", nargs="?", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--rows", type=int, help="of the catalogue (2,000) or of the huge file (1,300,000)")
    parser.add_argument("--steps", type=int, help="KNOWLEDGE_STEPS; without it the script's own")
    parser.add_argument("--seed", type=int, default=0, help="of the texts")
    parser.add_argument("--make", type=Path, metavar="FILE", help="only write the catalogue")
    parser.add_argument("--huge", type=Path, metavar="FILE", help="write 2 GB there, and time the reading")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    if options.huge:
        bench_huge(options.huge.resolve(), options.rows or HUGE_ROWS, options.seed)
        return
    options.rows = options.rows or 2000
    if options.make:
        write_catalogue(options.make, options.rows, options.seed)
    elif options.output:
        bench(options, words[end + 1:])
    else:
        parser.error("give MODEL and OUTPUT_DIR, or --make or --huge")


if __name__ == "__main__":
    main()
