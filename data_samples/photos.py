"""What is said about the photographs of images/photo: written by hand while looking at each of them.

FILES: our name -> file in scikit-image's data folder. Titles, authors and licences are in README.md.
GENERATION: (photo, type, prompt). UNDERSTANDING: (photo, type, question, answer, question, answer, ...).
"""

FILES = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "cat": "chelsea.png",
    "cell": "cell.png",
    "clock": "clock_motion.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
}

GENERATION = [
    ("astronaut", "short", "a smiling astronaut in an orange suit"),
    ("brick", "short", "dark bricks with light joints"),
    ("camera", "short", "a man filming on a lawn, black and white"),
    ("cat", "short", "a close-up of a tabby cat"),
    ("cell", "short", "a single round cell under a microscope"),
    ("coffee", "short", "a cup of espresso on a wooden table"),
    ("galaxies", "short", "galaxies in deep space"),
    ("grass", "short", "a lawn seen from above"),
    ("retina", "short", "the retina of a human eye"),
    ("rocket", "short", "a white rocket on its launch pad at dusk"),
    (
        "astronaut",
        "dense",
        "a studio portrait of a smiling woman with short light brown hair in an orange spacesuit with a"
        " wide open collar ring, a round purple mission patch on her chest and a helmet with a black visor"
        " in front of her; an American flag on the left, a model of a space shuttle with its brown tank"
        " on the right, a mottled grey backdrop",
    ),
    (
        "brick",
        "dense",
        "a black and white picture of long dark bricks laid in staggered columns with pale joints, seen"
        " at an angle so that the columns spread apart towards the lower edge and fill the whole frame",
    ),
    (
        "camera",
        "dense",
        "a black and white photograph of a dark-haired man in a long dark coat and gloves who bends"
        " forward to look through a small video camera on a tripod; he faces right, behind him lie a wide"
        " lawn and, low on the horizon, a pale dome and one tall tower under a clear sky",
    ),
    (
        "cat",
        "dense",
        "a close-up photograph of the face of a brown tabby cat with green-yellow eyes, a reddish nose,"
        " dark stripes on the forehead and long white whiskers, looking past the camera to the right, the"
        " background out of focus",
    ),
    (
        "coffee",
        "dense",
        "a photograph from above of a reddish brown espresso cup, white inside and half full, on a saucer"
        " of the same colour, with a small metal spoon lying beside the cup on the right, on a worn"
        " wooden table in warm light",
    ),
    (
        "galaxies",
        "dense",
        "a telescope picture of black space strewn with hundreds of galaxies of every size: orange ones"
        " with soft glowing edges, a few pale blue spirals, thin bright slivers and countless faint"
        " coloured specks, and two stars with crossed rays",
    ),
    (
        "gravel",
        "dense",
        "a black and white photograph from above of small angular grey stones that cover the ground from"
        " edge to edge, a few of them nearly white, with a few thin dry stalks between them",
    ),
    (
        "retina",
        "dense",
        "a medical photograph of the inside of a left eye: an orange-red disc on black, a bright yellow"
        " spot on the left from which dark red vessels branch out to all sides, and a darker red blur in"
        " the middle",
    ),
    (
        "rocket",
        "dense",
        "a photograph at dusk of a slender white rocket upright on its launch pad under a deep blue sky,"
        " between four tall lattice towers, two near and two far, with floodlights shining like stars"
        " along the ground and low dark clouds on the horizon",
    ),
    (
        "clock",
        "dense",
        "a black and white photograph, badly blurred by a sideways movement of the camera: a pale oval"
        " smear near the middle of an empty grey wall that gets darker towards the corners",
    ),
]

UNDERSTANDING = [
    (
        "astronaut",
        "caption",
        "Describe the image.",
        "A smiling woman with short hair in an orange spacesuit, with a helmet in front of her, a flag on"
        " the left and a model of a space shuttle on the right.",
    ),
    (
        "camera",
        "caption",
        "Write a caption for this photo.",
        "A man in a dark coat looks through a video camera on a tripod on a lawn.",
    ),
    (
        "cat",
        "caption",
        "Describe the image.",
        "A close-up of the face of a brown tabby cat with green-yellow eyes.",
    ),
    (
        "coffee",
        "caption",
        "What does the picture show?",
        "A cup of espresso on a saucer with a spoon, on a wooden table.",
    ),
    (
        "galaxies",
        "caption",
        "Write a caption for this photo.",
        "Hundreds of galaxies of different colours against black space.",
    ),
    (
        "retina",
        "caption",
        "Describe the image.",
        "The inside of an eye: an orange-red disc with branching blood vessels and a bright yellow spot"
        " on the left.",
    ),
    (
        "rocket",
        "caption",
        "Describe the image.",
        "A white rocket stands upright on its launch pad at dusk, between four lattice towers.",
    ),
    (
        "astronaut",
        "choice",
        "What colour is the spacesuit?\nA. white\nB. orange\nC. blue\nD. green\nAnswer with the letter.",
        "B",
    ),
    (
        "camera",
        "choice",
        "What does the camera stand on?\nA. a table\nB. a wall\nC. a tripod\nD. a car\nAnswer with the"
        " letter.",
        "C",
    ),
    (
        "coffee",
        "choice",
        "Where does the spoon lie?\nA. on the saucer\nB. in the cup\nC. on the floor\nAnswer with the"
        " letter.",
        "A",
    ),
    (
        "brick",
        "choice",
        "What is darker?\nA. the bricks\nB. the joints between them\nAnswer with the letter.",
        "A",
    ),
    (
        "cell",
        "choice",
        "In which half of the picture is the bright disc?\nA. the left half\nB. the right half\nAnswer"
        " with the letter.",
        "B",
    ),
    (
        "rocket",
        "choice",
        "Which way does the tip of the rocket point?\nA. up\nB. left\nC. right\nAnswer with the letter.",
        "A",
    ),
    ("clock", "choice", "Is this photo sharp or blurred?", "blurred"),
    ("astronaut", "yes_no", "Is the woman wearing her helmet on her head?", "No."),
    ("cat", "yes_no", "Are the cat's eyes open?", "Yes."),
    ("camera", "yes_no", "Is this a colour photo?", "No."),
    ("coffee", "yes_no", "Is there a spoon next to the cup?", "Yes."),
    ("grass", "yes_no", "Are there leaves lying in the grass?", "Yes."),
    ("gravel", "yes_no", "Is there any water in the picture?", "No."),
    ("rocket", "yes_no", "Is it bright noon in this photo?", "No."),
    (
        "astronaut",
        "open",
        "What stands behind the woman on the right?",
        "A model of a space shuttle.",
        "And on the left?",
        "An American flag.",
    ),
    ("camera", "open", "What is the man in the photo doing?", "He is looking through a video camera."),
    ("cat", "open", "What animal is this?", "A cat.", "What colour are its eyes?", "Green-yellow."),
    ("coffee", "open", "What colour is the inside of the cup?", "White."),
    ("galaxies", "open", "What colour is most of the background?", "Black."),
    ("gravel", "open", "What covers the ground?", "Small grey stones."),
    ("rocket", "open", "How many lattice towers are there?", "Four."),
]
