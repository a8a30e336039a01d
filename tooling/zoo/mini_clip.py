"""Builder of the mini-clip: a CLIPModel of 3 million parameters that knows icons, and the icons that test it.

    RUN="uv run --no-sync --with resvg-py==0.5.0 python tooling/zoo/mini_clip.py"
    $RUN fetch                      npm @iconify/json 2.2.535 (104 MB), once
    $RUN render                     captions, hold-outs, 64-pixel arrays, tokenizer
    $RUN train --steps 3000         resumes from its checkpoint; more steps extend a finished run
    $RUN evaluate                   held-out vendors and concepts
    $RUN export                     weights, tokenizer and evaluation set into packages/pt-vl/src/pt_vl/zoo

Data: icon sets under MIT, ISC, BSD, Apache-2.0, CC0, Unlicense or CC-BY, without logos. An icon's name is its caption; names of
classes come from the lexicon below. What is held out is fixed before anything is drawn:

- vendors: every set of `HELD_OUT` and of the vendors behind it. All evaluation images come from these sets, which fall
  into five domains (styles). Training drawings that are nearly pixel-equal to an evaluation drawing are dropped as well:
  icon sets copy from each other.
- concepts: about one lexicon concept in seven, and 100 emoji names outside of the lexicon, are taken out of every set.

The lexicon has groups (data sets: animals, food, ...), classes (bird, fish, ...) and concepts (owl, duck, ...). In training an
icon is captioned by its concept, sometimes by its class or group. So class names are known from other vendors' drawings,
as the class names of the usual benchmarks are known to CLIP.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import random
import re
import subprocess
import tarfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizerFast

from pt_core.files import write

PACKAGE, SHA256 = "@iconify/json@2.2.535", "1a545f86fa224d6531d8fb101dcbe83aac2b28689a21cbed6fc68318a5af4d91"
LICENCES = ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "CC0-1.0", "Unlicense", "CC-BY-4.0", "CC-BY-3.0")
ZOO = Path(__file__).resolve().parents[2] / "packages/pt-vl/src/pt_vl/zoo"
STORED, SIZE, PATCH, CONTEXT, VOCABULARY = 64, 48, 12, 32, 3000
START, END = "<|startoftext|>", "<|endoftext|>"

# Domain -> its sets, all held out of training; and sets that are unused: the same vendors, their copies, flags, animations.
HELD_OUT = {
    "emoji": ["twemoji", "emojione"],
    "silhouette": ["emojione-monotone"],
    "outline": ["tabler", "ph", "lucide", "hugeicons"],
    "solid": ["fa7-solid", "bi", "mdi"],
    "game": ["game-icons"],
    "map": ["pinhead", "maki", "temaki", "roentgen"],
}
UNUSED = re.compile(r"emojione|fa\d?-|la$|fa$|circle-flags|flag$|flagpack|cif|svg-spinners|ginetex|covid")
EMOJI = (
    "noto",
    "noto-v1",
    "fluent-emoji-flat",
    "fluent-emoji",
    "fluent-emoji-high-contrast",
    "fxemoji",
    "streamline-emojis",
)

# group -> class -> concepts, by the names that icon sets use
LEXICON = {
    "animal": {
        "bird": "bird eagle owl duck parrot penguin chicken rooster turkey dove swan flamingo peacock baby_chick "
        "hatching_chick front_facing_baby_chick crow goose ostrich toucan pigeon hen raven hummingbird dodo vulture",
        "sea animal": "fish shark whale dolphin octopus crab lobster shrimp squid seal jellyfish tropical_fish blowfish "
        "spouting_whale oyster starfish seahorse clown_fish manta_ray salmon",
        "insect": "bee honeybee ant butterfly bug beetle lady_beetle ladybug mosquito fly spider caterpillar cricket "
        "cockroach scorpion worm dragonfly snail wasp moth",
        "reptile": "snake turtle lizard crocodile frog dragon dragon_face dinosaur sauropod t_rex gecko tortoise chameleon "
        "sea_turtle cobra snake_tongue salamander toad",
        "pet": "cat cat_face dog dog_face rabbit rabbit_face hamster mouse mouse_face guide_dog poodle service_dog black_cat "
        "dog_side cat_side paw paw_prints paw_print rat",
        "farm animal": "cow cow_face pig pig_face sheep ewe goat horse horse_face donkey ox ram llama camel two_hump_camel "
        "water_buffalo pig_nose bull piglet chicken_coop hen_house",
        "wild animal": "lion tiger tiger_face elephant bear wolf fox monkey monkey_face gorilla giraffe zebra panda koala "
        "kangaroo deer rhinoceros hippopotamus leopard raccoon hedgehog bat sloth otter skunk badger squirrel chipmunk boar "
        "bison mammoth orangutan moose beaver unicorn polar_bear bear_face lion_face hippo",
    },
    "food": {
        "fruit": "apple red_apple green_apple banana cherry cherries grape grapes lemon lime orange tangerine strawberry pear "
        "peach pineapple watermelon melon mango kiwi kiwi_fruit blueberries coconut avocado plum fig raspberry fruit olive",
        "vegetable": "carrot corn ear_of_corn tomato potato onion garlic pepper hot_pepper chili chili_pepper chilli broccoli "
        "cucumber lettuce leafy_green eggplant mushroom pumpkin cabbage radish peas bell_pepper aubergine salad green_salad "
        "ginger pea_pod roasted_sweet_potato beans chestnut peanut peanuts salad_bowl turnip asparagus",
        "drink": "coffee tea beer beer_mug clinking_beer_mugs wine wine_glass cocktail cocktail_glass milk glass_of_milk juice "
        "hot_beverage tropical_drink champagne teacup sake cup mug soda beverage_box bubble_tea martini mate tumbler_glass "
        "coffee_cup mug_hot clinking_glasses bottle_with_popping_cork beer_bottle wine_bottle water_bottle glass pint cup_straw "
        "beer_stein tea_cup cup_with_straw drink martini_glass champagne_glasses coffee_togo",
        "dessert": "cake birthday_cake cupcake cookie donut doughnut ice_cream soft_ice_cream shaved_ice candy lollipop "
        "chocolate chocolate_bar pie custard honey_pot shortcake popsicle macaron candy_cane cake_slice ice_pop muffin dango "
        "moon_cake cookie_man gingerbread_man pudding sweets ice_cream_cone",
        "meal": "pizza pizza_slice hamburger burger hot_dog hotdog taco burrito sandwich sushi noodles ramen steaming_bowl "
        "spaghetti pasta soup bowl_food cooked_rice curry_rice french_fries steak cut_of_meat meat meat_on_bone poultry_leg "
        "bacon fried_shrimp bento_box falafel pot_of_food shallow_pan_of_food cooking egg fried_egg rice_ball dumpling oden "
        "bread croissant baguette baguette_bread bagel pretzel toast waffle pancakes bread_slice flatbread cheese cheese_wedge "
        "stuffed_flatbread takeout_box sausage ham bowl_rice meatball fish_cake_with_swirl rice_cracker tamale",
        "kitchenware": "knife kitchen_knife fork spoon fork_and_knife fork_knife fork_and_knife_with_plate pot pan kettle teapot "
        "blender plate bowl toaster oven cooking_pot frying_pan whisk spatula chef_hat microwave rolling_pin utensils ladle "
        "chopsticks cutlery restaurant jar bowl_with_spoon tools_kitchen cauldron corkscrew grater salt mixer",
    },
    "transport": {
        "car": "car automobile taxi suv jeep sports_car racing_car police_car oncoming_automobile oncoming_taxi "
        "oncoming_police_car car_side car_front pickup_truck sport_utility_vehicle caravan sedan convertible cab carpool "
        "car_crash car_profile formula_1 car_suv car_garage",
        "truck or bus": "truck delivery_truck fire_engine fire_truck ambulance tractor bulldozer van articulated_lorry bus "
        "minibus trolleybus dump_truck forklift tow_truck camper excavator garbage_truck bus_front oncoming_bus truck_front "
        "shuttle_van bus_simple backhoe school_bus truck_pickup truck_monster rv firetruck truck_moving lorry",
        "train": "train tram metro subway locomotive railway_car bullet_train high_speed_train light_rail monorail "
        "mountain_railway station tram_car suspension_railway mountain_cableway aerial_tramway train_subway cable_car "
        "train_front train_track train_tram gondola funicular rail rail_metro train_steam train_simple train_regional",
        "ship": "ship boat sailboat ferry motor_boat speedboat canoe anchor passenger_ship submarine yacht kayak sailing "
        "ship_wheel lifebuoy ring_buoy rowboat cargo_ship drakkar galleon raft trireme",
        "aircraft": "airplane plane helicopter rocket small_airplane airplane_departure airplane_arrival parachute drone "
        "hot_air_balloon satellite flying_saucer space_shuttle jet glider ufo plane_departure plane_arrival airport plane_up "
        "airplane_takeoff airplane_landing jet_fighter fighter_jet rocket_launch paper_plane air_balloon biplane zeppelin "
        "jet_engine spaceship",
        "bicycle": "bicycle bike motorcycle motorbike scooter motor_scooter kick_scooter moped tricycle skateboard unicycle "
        "electric_scooter e_bike person_biking cycling cyclist bicycling motorized_wheelchair roller_skate person_simple_bike "
        "bmx motorcycle_cruiser e_scooter",
    },
    "weather": {
        "sun": "sun sunny sunrise sunset sun_with_face sunrise_over_mountains sun_dim sun_horizon sun_high sun_low "
        "brightness_high sunbeams sun_fog sundown sun_behind_cloud eclipse",
        "moon": "moon full_moon crescent_moon new_moon full_moon_face new_moon_face first_quarter_moon last_quarter_moon "
        "first_quarter_moon_face last_quarter_moon_face waxing_crescent_moon waning_crescent_moon waxing_gibbous_moon "
        "waning_gibbous_moon moon_stars night moonset",
        "cloud": "cloud cloudy clouds fog foggy mist cloud_fog smog overcast cloud_sun cloud_moon sun_behind_small_cloud "
        "sun_behind_large_cloud haze cloud_haze partly_cloudy",
        "rain": "rain cloud_rain rainy umbrella umbrella_with_rain_drops raindrop droplet raindrops cloud_drizzle drizzle drop "
        "sun_behind_rain_cloud cloud_with_rain closed_umbrella rainbow cloud_showers_heavy cloud_rain_heavy umbrella_open raining "
        "cloud_showers_water water_drop drops droplets droplet_half",
        "snow": "snowflake snow snowman cloud_snow hail cloud_with_snow snowman_without_snow cloud_hail cloud_sleet ice icicles "
        "sleet snowing snowflakes frozen_body snow_bottle snowy",
        "storm": "lightning thunderstorm tornado hurricane cloud_lightning cyclone wind cloud_with_lightning "
        "cloud_with_lightning_and_rain high_voltage storm cloud_bolt cloud_storm wind_face thunder dashing_away typhoon "
        "lightning_storm lightning_bolt windy tropical_storm bolt",
    },
    "nature": {
        "tree": "tree pine evergreen_tree palm_tree deciduous_tree christmas_tree trees bamboo tree_evergreen tree_palm "
        "pine_tree forest oak willow tree_deciduous tree_2 beech birch_trees",
        "flower": "flower rose tulip sunflower hibiscus blossom cherry_blossom bouquet lotus wilted_flower hyacinth white_flower "
        "flower_lotus flower_tulip rosette daisy dandelion_flower vanilla_flower spa flowers",
        "leaf": "leaf leaves herb seedling clover shamrock four_leaf_clover maple_leaf fallen_leaf plant sprout potted_plant "
        "leaf_fluttering_in_wind sheaf_of_rice cactus wheat canadian_maple_leaf grain grass fern plant_wilt pine_cone hops "
        "barley oak_leaf linden_leaf",
        "mountain": "mountain mountains volcano island desert snow_capped_mountain mount_fuji national_park desert_island peak hill "
        "mountain_sun beach camping cave peaks hills landscape stone rock cliff",
        "fire": "fire flame bonfire campfire wildfire torch fire_flame fire_simple flames explosion collision firecracker fireworks "
        "sparkler small_fire burning_forest dynamite fire_ring",
        "planet": "planet earth globe globe_showing_europe_africa globe_showing_americas globe_showing_asia_australia ringed_planet "
        "world galaxy milky_way comet meteor star shooting_star glowing_star solar_system saturn globe_stand star_half stars "
        "earth_africa earth_americas earth_asia earth_europe earth_oceania globe_hemisphere_east globe_hemisphere_west",
        "water": "wave waves water water_wave river fountain waterfall sea well swimming_pool wave_sine ocean lake big_wave "
        "wave_crest potable_water tsunami",
    },
    "sport": {
        "ball": "ball soccer_ball basketball football american_football baseball volleyball tennis_ball rugby rugby_football "
        "bowling_ball softball soccer beach_ball baseball_ball football_ball golf_ball ball_football pool_8_ball bowling",
        "racket sport": "tennis ping_pong badminton golf cricket_game field_hockey ice_hockey hockey lacrosse racquet tennis_racket "
        "table_tennis flag_in_hole ball_tennis hockey_sticks person_golfing racquetball squash shuttlecock cricket_bat golf_ball_tee "
        "table_tennis_paddle_ball baseball_bat hockey_puck disc_golf",
        "award": "trophy medal 1st_place_medal 2nd_place_medal 3rd_place_medal sports_medal military_medal award laurel laurels "
        "ribbon award_medal trophy_cup certificate podium medal_military medal_2 ranking_star laurel_wreath trophies laurel_crown",
        "water sport": "swimming surfing rowing diving diving_mask person_swimming person_surfing person_rowing_boat scuba_diving "
        "person_playing_water_polo swimmer woman_swimming man_swimming woman_surfing man_surfing woman_rowing_boat man_rowing_boat "
        "person_simple_swim person_swimming_pool snorkel swim kitesurfing surfer surfboard sailing_dinghy water_polo "
        "man_playing_water_polo woman_playing_water_polo scuba_mask fins",
        "winter sport": "skiing skis ski sled snowboard snowboarder ice_skate skier curling_stone person_skiing person_snowboarding "
        "sledding snowboarding ice_skating ski_jumping person_skiing_nordic sledge chairlift ski_boot speed_skating skating snowmobile "
        "sleigh boot_ski",
        "exercise": "dumbbell weight_lifting barbell yoga running person_running person_lifting_weights walking person_walking run "
        "gym fitness hiking person_hiking man_running woman_running man_lifting_weights woman_lifting_weights weight treadmill "
        "person_in_lotus_position person_cartwheeling person_climbing climbing person_simple_run barbell_simple stretching muscle_up "
        "woman_cartwheeling man_cartwheeling gymnastics weightlifting jumping_rope muscle person_simple_hike person_simple_walk",
        "game": "dice game_die chess chess_pawn chess_knight chess_king chess_queen chess_rook chess_bishop puzzle puzzle_piece "
        "joystick game_controller gamepad video_game cards joker domino slot_machine mahjong yo_yo playing_cards flower_playing_cards "
        "dice_five dice_six dice_one dice_two dice_three dice_four dice_d6 dice_d20 device_gamepad controller nesting_dolls "
        "crystal_ball magic_wand spades hearts clubs card_joker dice_1 dice_2 dice_3 dice_4 dice_5 dice_6 dreidel pinball checkers",
    },
    "media": {
        "musical instrument": "guitar violin banjo electric_guitar trumpet saxophone flute drum maracas piano harp accordion "
        "long_drum musical_keyboard tambourine gong xylophone guitars piano_keys trombone harmonica bagpipes lute drum_kit "
        "grand_piano ocarina bell_gong lyre pan_flute guitar_head",
        "musical note": "music musical_note musical_notes musical_score music_note music_notes note clef g_clef treble_clef "
        "music_note_beamed music_notes_simple music_note_simple f_clef",
        "camera": "camera photo_camera video_camera movie_camera film_camera camera_with_flash camcorder webcam camera_retro video "
        "camera_reels camera_video polaroid film_projector camera_slash device_cctv security_camera cctv dslr binoculars",
        "audio device": "speaker loudspeaker megaphone headphone headphones headset microphone studio_microphone radio bullhorn "
        "volume speaker_high_volume speaker_low_volume speaker_medium_volume muted_speaker mic boombox earbuds vinyl_record "
        "optical_disk walkie_talkie sound_on sound_off control_knobs level_slider microphone_stage cassette_tape vinyl disc "
        "microphone_lines speaker_high speaker_low speaker_none volume_high volume_low volume_off public_address_system",
        "screen": "tv television monitor desktop_computer laptop computer display device_desktop device_tv device_laptop tablet "
        "screen pc_display desktop device_tablet presentation projector_screen laptop_code pc_monitor television_simple",
        "film": "film film_frames film_strip clapper_board clapperboard cinema movie popcorn film_reel theater theater_masks "
        "performing_arts masks_theater ticket admission_tickets film_slate movie_theater tickets film_spool",
    },
    "face": {
        "happy face": "smile grin laugh grinning_face smiling_face beaming_face_with_smiling_eyes face_with_tears_of_joy "
        "grinning_squinting_face grinning_face_with_smiling_eyes grinning_face_with_big_eyes smiling_face_with_smiling_eyes "
        "slightly_smiling_face smiley mood_happy emoji_smile emoji_laughing face_smile face_laugh face_grin happy mood_smile "
        "rolling_on_the_floor_laughing grinning_face_with_sweat winking_face smiling_face_with_sunglasses face_savoring_food "
        "smiling_face_with_halo mood_wink emoji_wink face_laugh_beam face_grin_wide face_smile_beam laughing smiling_face_with_horns "
        "face_grin_tears face_grin_squint face_smile_wink emoji_grin mood_crazy_happy face_laugh_squint face_grin_beam",
        "sad face": "frown crying_face sad disappointed_face loudly_crying_face frowning_face slightly_frowning_face mood_sad "
        "emoji_frown face_frown face_sad_tear face_sad_cry worried_face pensive_face sad_but_relieved_face anguished_face "
        "confused_face persevering_face weary_face tired_face unamused_face smiley_sad mood_cry emoji_tear face_frown_open "
        "downcast_face_with_sweat confounded_face fearful_face mood_sad_2 face_tired emoji_expressionless face_holding_back_tears",
        "angry face": "angry angry_face pouting_face face_with_steam_from_nose angry_face_with_horns face_angry mood_angry emoji_angry "
        "enraged_face face_with_symbols_on_mouth smiley_angry mad evil devil imp ogre goblin",
        "love": "heart red_heart beating_heart growing_heart heart_with_arrow broken_heart two_hearts revolving_hearts "
        "sparkling_heart heart_with_ribbon smiling_face_with_heart_eyes smiling_face_with_hearts face_blowing_a_kiss kissing_face "
        "kissing_face_with_smiling_eyes kissing_face_with_closed_eyes heart_crack heart_break heart_broken hearts_eyes kiss_mark "
        "love_letter emoji_heart_eyes face_grin_hearts face_kiss heart_suit hearts heart_decoration heart_exclamation blue_heart "
        "green_heart yellow_heart purple_heart black_heart orange_heart heart_straight heart_arrow arrow_through_heart heartbreak "
        "face_kiss_beam emoji_kiss love_song",
        "surprised face": "astonished_face face_with_open_mouth hushed_face flushed_face face_screaming_in_fear surprised "
        "face_surprise emoji_surprise mood_surprised shocked_face_with_exploding_head dizzy_face face_flushed face_dizzy emoji_dizzy "
        "frowning_face_with_open_mouth grimacing_face mood_nervous face_grimace smiley_x_eyes face_without_mouth anxious_face_with_sweat "
        "face_meh mood_neutral emoji_neutral neutral_face expressionless_face smiley_nervous smiley_blank smiley_meh mood_empty "
        "face_rolling_eyes face_meh_blank screaming",
        "hand": "hand thumbs_up thumbs_down waving_hand ok_hand victory_hand raised_fist raised_hand clapping_hands handshake "
        "folded_hands oncoming_fist index_pointing_up backhand_index_pointing_up backhand_index_pointing_down "
        "backhand_index_pointing_left backhand_index_pointing_right crossed_fingers vulcan_salute love_you_gesture call_me_hand "
        "sign_of_the_horns open_hands palms_up_together raising_hands hand_with_fingers_splayed raised_back_of_hand pinching_hand "
        "hand_thumbs_up hand_thumbs_down hand_fist hand_peace hand_pointing hand_point_up hand_point_down hand_point_left "
        "hand_point_right hand_waving hands_clapping hand_index hand_palm hand_stop hand_rock hand_grab hand_middle_finger middle_finger "
        "left_facing_fist right_facing_fist hands_praying hand_heart hand_love_you hand_finger hand_three_fingers hand_two_fingers "
        "hand_scissors hand_lizard hand_spock hand_back_fist hands fist",
        "body part": "ear eye eyes nose mouth lips foot leg tooth brain lungs bone tongue anatomical_heart flexed_biceps bones footprints "
        "ear_with_hearing_aid mechanical_arm mechanical_leg skull kidneys stomach liver spine skeleton hearing shoe_prints "
        "person_standing eyeball rib_cage ribcage",
    },
    "household": {
        "tool": "hammer wrench screwdriver saw axe pick nut_and_bolt toolbox tool_box pliers drill shovel ladder pickaxe hammer_and_wrench "
        "hammer_and_pick carpentry_saw trowel bucket broom rake tool tools clamp gear crowbar sickle spade chainsaw scissors paperclip "
        "pushpin spanner anvil wheelbarrow plunger magnet nails nail screw handsaw hand_saw helmet_safety drill_bit",
        "weapon": "sword swords crossed_swords dagger bomb gun pistol bow_and_arrow shield water_pistol spear archery boomerang mace trident "
        "crossbow grenade gunshot sabre katana scythe arrow_bow battle_axe blunderbuss cannon catapult musket halberd slingshot nunchaku "
        "bow_arrow axe_sword tank flail machete",
        "furniture": "chair bed couch sofa couch_and_lamp table desk door window bathtub shower toilet mirror armchair bath bathroom "
        "shelf wardrobe drawer bunk_bed bench stool cabinet bookshelf office_chair door_open door_closed cabinet_filing bed_double "
        "washing_machine refrigerator fridge air_conditioner sink person_in_bed dresser picnic_table shelves books_shelf rug",
        "lamp": "lamp light_bulb lightbulb bulb candle flashlight lantern floor_lamp table_lamp desk_lamp diya_lamp red_paper_lantern "
        "light_switch chandelier street_light lamp_desk lamp_floor lamp_pendant candles old_lantern street_lamp lamp_2 bulb_off",
        "pen": "pencil pen crayon paintbrush brush marker fountain_pen black_nib eraser highlighter pen_nib quill feather paint_brush "
        "pencil_alt writing_hand artist_palette palette paint_roller ruler straight_ruler triangular_ruler pen_fancy pencil_ruler "
        "paint_bucket pencil_line pen_clip feather_pointed ballpen",
        "clothing": "shirt t_shirt tshirt jeans dress coat socks gloves scarf necktie kimono bikini shorts sari lab_coat safety_vest "
        "running_shirt womans_clothes one_piece_swimsuit briefs pants hoodie jacket vest skirt tie sock coat_hanger shirt_sport hanger "
        "belt trousers sweater mitten apron robe clothes_hanger baby_clothes user_tie",
        "shoe or hat": "shoe boot sandal running_shoe mans_shoe womans_boot womans_sandal high_heeled_shoe flat_shoe hiking_boot "
        "ballet_shoes thong_sandal shoes sneaker high_heels boots hat top_hat cap billed_cap crown graduation_cap helmet womans_hat "
        "rescue_workers_helmet military_helmet hard_hat baseball_cap cowboy_hat hat_cowboy hat_wizard hat_santa sneaker_move "
        "baseball_helmet shoe_horn beanie sandals queen_crown viking_helmet high_heel fedora hat_glasses",
        "bag": "bag backpack handbag shopping_bag shopping_bags briefcase suitcase luggage purse clutch_bag wallet school_backpack basket "
        "shopping_cart shopping_basket tote tote_simple bag_shopping basket_shopping cart_shopping cart baggage_claim suitcase_rolling "
        "bag_handle briefcase_medical suitcase_simple knapsack duffel_bag",
        "jewellery or glasses": "ring gem diamond gem_stone necklace glasses sunglasses goggles eyeglasses prayer_beads diamonds diamond_ring "
        "engagement_ring pearl_necklace monocle earrings sunglass emerald gems",
        "key or lock": "key lock padlock old_key unlock locked unlocked locked_with_key locked_with_pen keyhole lock_open keys key_off "
        "lock_key lock_simple password unlock_keyhole lock_square safe vault",
        "clock": "clock watch alarm_clock stopwatch timer hourglass mantelpiece_clock hourglass_done hourglass_not_done timer_clock alarm "
        "timer_off clock_alarm one_oclock two_oclock three_oclock four_oclock five_oclock six_oclock seven_oclock eight_oclock nine_oclock "
        "ten_oclock eleven_oclock twelve_oclock smartwatch device_watch sundial pocket_watch hourglass_start hourglass_half hourglass_end",
    },
    "place": {
        "house": "house home hut houses house_with_garden derelict_house cottage cabin house_chimney home_2 house_simple warehouse "
        "house_door barn farm home_eco house_line garage igloo tipi village family_house_tree wood_cabin",
        "place of worship": "church mosque synagogue temple kaaba shinto_shrine hindu_temple torii_gate torii pagoda chapel "
        "place_of_worship gopuram vihara building_church building_mosque shrine stupa buddhist_temple building_pavilion",
        "public building": "building office_building skyscraper city cityscape hotel hospital school factory bank post_office "
        "japanese_post_office classical_building museum university library stadium city_hall courthouse police_station fire_station "
        "prison government buildings apartment building_bank building_factory building_hospital building_skyscraper building_columns "
        "hotel_building cityscape_at_dusk building_community building_stadium town_hall embassy civic_building building_office",
        "shop": "shop store market convenience_store department_store love_hotel storefront building_store supermarket bakery cafe "
        "bar shopping_mall barber_pole gas_station fuel gas_pump fuel_pump kiosk shop_window pharmacy hairdresser florist butcher ",
        "castle or tower": "castle tower japanese_castle tokyo_tower lighthouse statue_of_liberty eiffel_tower water_tower fort fortress "
        "observation_tower monument windmill castle_turret building_castle chess_tower watchtower white_tower radio_tower tower_observation "
        "pyramid obelisk ruins stone_tower evil_tower broadcast_tower building_lighthouse moai",
        "tent or fair": "tent circus_tent ferris_wheel roller_coaster carousel carousel_horse playground playground_slide tents "
        "campground tipi_tent theme_park amusement_park festival_tent camping_tent building_circus slide swing seesaw sandbox umbrella_on_ground "
        "beach_with_umbrella park_bench picnic_site",
        "bridge or road": "bridge bridge_at_night road motorway railway_track railway traffic_light vertical_traffic_light "
        "horizontal_traffic_light stop_sign crossing highway construction fence tunnel traffic_cone foggy gate stone_bridge "
        "barrier bus_stop road_barrier stairs signpost toll roundabout crosswalk dam",
    },
    "office": {
        "telephone": "phone telephone mobile_phone smartphone telephone_receiver phone_call device_mobile fax fax_machine call mobile "
        "phone_ring pager phone_vibrate mobile_phone_with_arrow phone_landline telephone_fill mobile_screen phone_volume cell_phone vibration_mode",
        "mail": "mail envelope mailbox email e_mail inbox envelope_with_arrow incoming_envelope open_mailbox_with_raised_flag "
        "closed_mailbox_with_raised_flag closed_mailbox_with_lowered_flag open_mailbox_with_lowered_flag postbox inbox_tray outbox_tray "
        "mail_opened envelope_open envelope_simple letter mail_2 post_box mailbox_full envelope_paper ballot_box_with_ballot",
        "book": "book open_book notebook books bible blue_book green_book orange_book closed_book notebook_with_decorative_cover ledger "
        "address_book bookmark newspaper rolled_up_newspaper journal book_open book_open_text book_bookmark book_2 book_atlas notebook_2 "
        "book_bible book_quran scroll notepad spiral_notepad dictionary spell_book bookmarks bookmark_tabs journal_bookmark secret_book",
        "money": "coin coins dollar money money_bag credit_card banknote dollar_banknote euro_banknote pound_banknote yen_banknote "
        "piggy_bank money_with_wings cash cash_stack currency_dollar currency_euro currency_pound currency_yen money_bill receipt atm "
        "heavy_dollar_sign hand_coins coins_pile two_coins currency_rupee sack_dollar dollar_sign euro yen bitcoin wallet_money "
        "credit_card_off crown_coin piggy_bank_2",
        "chart": "chart bar_chart pie_chart line_chart chart_bar chart_pie chart_line chart_area chart_increasing chart_decreasing graph "
        "chart_donut analytics statistics chart_increasing_with_yen bar_chart_line graph_up graph_down chart_simple chart_dots chart_scatter "
        "trending_up trending_down trend_up trend_down chart_polar chart_histogram histogram",
        "calendar": "calendar calendar_day calendar_days tear_off_calendar spiral_calendar calendar_event calendar_check calendar_plus "
        "calendar_minus calendar_x calendar_week calendar_month calendar_date schedule calendar_blank calendar_star calendar_time "
        "calendar_dots calendar_stats calendar_heart calendar_xmark",
        "medicine": "pill pills syringe capsule adhesive_bandage bandage vaccine stethoscope thermometer first_aid first_aid_kit medicine "
        "drop_of_blood crutch wheelchair tablets capsules prescription prescription_bottle kit_medical heart_pulse heartbeat band_aid "
        "medical_pack health_potion manual_wheelchair x_ray bandaid bandage_roll vial_medical medical_cross",
        "science": "microscope flask test_tube alembic petri_dish telescope dna atom atom_symbol test_tubes beaker vial erlenmeyer "
        "flask_2 microbe virus bacteria radioactive biohazard molecule atom_2 fizzing_flask radiation flask_vial test_pipe vials "
        "round_bottom_flask chemistry",
    },
}  # fmt: skip

MARKS = ("outline outlined filled fill rounded round sharp twotone two-tone line linear bold thin light duotone solid regular "
         "broken baseline color bulk linear alt rtl ltr tone small big low-profile").split()  # fmt: skip
STYLES = {"filled": {"fill", "filled", "solid", "bold"}, "outline": {"outline", "outlined", "line", "linear", "thin", "light"},
          "duotone": {"duotone", "twotone", "two-tone", "bulk"}}  # fmt: skip
COLOURS = {
    "black": (20, 20, 20), "red": (205, 35, 40), "orange": (240, 130, 20), "yellow": (235, 200, 30), "green": (40, 150, 65),
    "blue": (35, 85, 200), "purple": (125, 50, 165), "pink": (235, 110, 170), "brown": (120, 75, 40), "grey": (125, 125, 125),
}  # fmt: skip
# {n}: the noun; {s}: style; {c}: colour; {g}: the sets' own category. A template is used where all that it names is known.
SHORT = ["{n}", "a {n}", "{n}.", "an icon of a {n}.", "a photo of a {n}.", "a picture of a {n}.", "a drawing of a {n}.",
         "a {s} icon of a {n}.", "{s} {n}", "a {c} {n}", "a {c} icon of a {n}.", "a small {n}", "the {n}", "{n} icon"]  # fmt: skip
LONG = ["an icon in {s} style that shows a {n}, one of many in the category {g}.", "this is a small picture of a {n} on a plain background.",
        "a {c} icon on a plain background, it shows a {n} and nothing else.", "{g}: a {n}, drawn as a simple {s} icon.",
        "one small and simple drawing, made for a web page or an app, of a {n}."]  # fmt: skip

app = typer.Typer(no_args_is_help=True, add_completion=False)
WORK = typer.Option(Path("runs/mini-clip"), help="folder of what is fetched, rendered and trained")


def caption(icon: str) -> str:
    """Name of an icon without size, weight and fill, as words."""
    words = re.sub("^(baseline|outline|round|sharp|twotone)-", "", icon.lower())
    while (
        shorter := re.sub(rf"(?<!traffic)(?<!street)-({'|'.join(MARKS)}|16|20|24|28|32|48|64)$", "", words)
    ) != words:
        words = shorter
    return words.replace("-", " ")


def rank(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)


def lexicon() -> dict[str, tuple[str, str]]:
    """concept -> (class, group); plurals and singulars of a concept count as the concept's own names."""
    return {
        concept.replace("_", " "): (name, group)
        for group, classes in LEXICON.items()
        for name, concepts in classes.items()
        for concept in concepts.split()
    }


def vendor(prefix: str) -> str:
    """Sets of one vendor repeat its drawings."""
    return re.sub(
        r"^(streamline|icon-park|material-symbols|noto|fluent-emoji|heroicons|pepicons|glyphs|at|bx).*", r"\1", prefix
    )


def read_icons(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows (set, icon, caption, class, group, category, style, split) of all usable icons, and the sets.

    split: "train"; "held-out" (a held-out vendor's icon) and `unseen` (its concept is in no training image).
    """
    sets = {k: v for k, v in json.loads((folder / "collections.json").read_text()).items()
            if v["license"].get("spdx") in LICENCES and v.get("category") not in ("Logos", "Programming")}  # fmt: skip
    domains = {name: domain for domain, names in HELD_OUT.items() for name in names}
    known, rows = lexicon(), []
    for prefix in sets:
        if UNUSED.match(prefix) and prefix not in domains:
            continue
        data = json.loads((folder / "json" / f"{prefix}.json").read_text())
        category = {icon: name for name, icons in data.get("categories", {}).items() for icon in icons}
        seen: Counter[str] = Counter()
        unlike = {"outline": "fill|bold|solid|duotone", "solid": "outline|line", None: " "}.get(
            domains.get(prefix), " "
        )
        for icon in sorted(data["icons"], key=lambda icon: (bool(re.search(unlike, icon)), rank(icon))):
            name = caption(icon)
            skip = "skin-tone" in icon or icon.startswith("flag-") or data["icons"][icon].get("hidden")
            # one drawing of a concept per vendor is evaluated; two weights of one drawing are trained on
            if skip or not re.search("[a-z]{2}", name) or seen[name] >= (1 if prefix in domains else 2):
                continue
            seen[name] += 1
            words = set(icon.split("-"))
            style = (
                "emoji"
                if prefix in (*EMOJI, *HELD_OUT["emoji"])
                else next((s for s, w in STYLES.items() if w & words), None)
            )
            tidy = (
                re.sub(r"([a-z])([A-Z])", r"\1 \2", category.get(icon, ""))
                .replace("&", "and")
                .replace("/", "or")
                .lower()
            )
            kind = (
                known.get(name)
                or known.get(name.removesuffix("s"))
                or known.get(name + "s")
                or known.get(name.removesuffix(" face"))
                or (None, None)
            )
            rows.append({"set": prefix, "icon": icon, "caption": name, "class": kind[0], "group": kind[1], "category": tidy,
                         "style": style, "mono": not sets[prefix].get("palette"), "domain": domains.get(prefix)})  # fmt: skip
    return rows, sets


def hold_out(rows: list[dict[str, Any]]) -> set[str]:
    """Captions that no training image has: one lexicon concept in seven by hash, and 100 other emoji of 4 and more sets."""
    emoji = defaultdict(set)
    for row in rows:
        if row["set"] in (*EMOJI, *HELD_OUT["emoji"]):
            emoji[row["caption"]].add(row["set"])
    others = [name for name, sets in emoji.items() if len(sets) >= 4 and name not in lexicon()]
    return {name for name in lexicon() if rank(f"concept {name}") % 7 == 0} | set(sorted(others, key=rank)[:100])


def draw(icon: dict[str, Any], data: dict[str, Any], size: int) -> np.ndarray:
    """RGBA (size, size, 4) uint8; `currentColor` is black."""
    import resvg_py

    box = [
        icon.get(key, data.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    body = icon["body"].replace("currentColor", "#000")
    head = (
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}"'
    )
    png = bytes(resvg_py.svg_to_bytes(svg_string=f'<svg {head} viewBox="{" ".join(map(str, box))}">{body}</svg>'))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC))


@app.command()
def fetch(work: Path = WORK) -> None:
    """Download the icon sets (npm) and unpack them; nothing of the package runs."""
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["npm", "pack", PACKAGE, "--ignore-scripts", "--pack-destination", str(work)],
        check=True,
        stdout=subprocess.PIPE,
    )
    (tarball,) = work.glob("iconify-json-*.tgz")
    if hashlib.sha256(tarball.read_bytes()).hexdigest() != SHA256:
        raise SystemExit(f"{tarball} is not {PACKAGE}: remove it and fetch again")
    with tarfile.open(tarball) as tar:
        tar.extractall(work, filter="data")


@app.command()
def render(work: Path = WORK) -> None:
    """Choose captions and hold-outs, draw the icons, drop copies of evaluation drawings, train the tokenizer."""
    rows, _ = read_icons(work / "package")
    unseen = hold_out(rows)
    vendors = defaultdict(set)
    for row in rows:
        if not row["domain"]:
            vendors[row["caption"]].add(vendor(row["set"]))
    # A name that three vendors use names something that can be learnt; emoji names are standardised.
    rows = [row for row in rows if (
        (row["class"] or (row["set"] in HELD_OUT["emoji"] and len(vendors[row["caption"]]) > 1)) if row["domain"]
        else row["caption"] not in unseen and (len(vendors[row["caption"]]) >= 3 or row["set"] in EMOJI or row["class"]))]  # fmt: skip
    print(len(rows), "icons", len({row["caption"] for row in rows}), "captions", flush=True)
    images = np.lib.format.open_memmap(work / "all.npy", "w+", np.uint8, (len(rows), STORED, STORED, 4))
    small = np.zeros((len(rows), 16, 16), np.float32)
    data: dict[str, Any] = {}
    good, start = [], time.time()
    for i, row in enumerate(rows):
        if data.get("prefix") != row["set"]:
            data = json.loads((work / "package/json" / f"{row['set']}.json").read_text())
        with contextlib.suppress(Exception):  # a drawing that the renderer refuses is left out
            images[i] = draw(data["icons"][row["icon"]], data, STORED)
            small[i] = (
                (images[i, ..., 3] / 255 * (1 - images[i, ..., :3].mean(-1) / 400)).reshape(16, 4, 16, 4).mean((1, 3))
            )
            if small[i].mean() > 0.01:
                good.append(i)
    print(f"drawn {len(good)} in {time.time() - start:.0f} s", flush=True)
    held = np.array([i for i in good if rows[i]["domain"]])
    train = np.array([i for i in good if not rows[i]["domain"]])
    copies = near(small[train].reshape(len(train), -1), small[held].reshape(len(held), -1))
    print("training drawings dropped as copies of evaluation drawings:", int(copies.sum()), flush=True)
    keep = np.concatenate([train[~copies], held])
    np.save(work / "images.npy", images[keep])
    (work / "all.npy").unlink()
    kept = [rows[i] | {"unseen": rows[i]["caption"] in unseen} for i in keep]
    write(work / "rows.json", json.dumps(kept))
    train_tokenizer([row["caption"] for row in kept if not row["domain"]], work / "tokenizer")


def near(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether a query (n, d) is within 12 % of its own norm of some key (m, d): the same drawing, up to smoothing."""
    squares, found = (keys**2).sum(1), []
    for start in range(0, len(queries), 2000):
        block = queries[start : start + 2000]
        norm = (block**2).sum(1)
        distance = norm[:, None] - 2 * block @ keys.T + squares
        found.append(distance.min(1) < 0.12**2 * norm)
    return np.concatenate(found)


def train_tokenizer(captions: list[str], folder: Path) -> None:
    """Byte-level BPE in CLIP's form; the end token has the highest id, as pooling by argmax expects."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=True)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [
        *captions,
        *(f"{name} {group}" for name, group in lexicon().values()),
        *(SHORT + LONG + [*COLOURS, *STYLES]) * 50,
    ]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - 258, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False))  # fmt: skip
    merges = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *("".join(merge) for merge in merges)]
    tokens = [*dict.fromkeys(tokens), START, END]
    CLIPTokenizerFast(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=CONTEXT,
        bos_token=START, eos_token=END, unk_token=END, pad_token=END,
    ).save_pretrained(folder)  # fmt: skip


def new_model(tokenizer: CLIPTokenizerFast) -> CLIPModel:
    tower = {"num_hidden_layers": 4, "hidden_act": "gelu", "projection_dim": 128}
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 3,
        "image_size": SIZE,
        "patch_size": PATCH,
    }
    return CLIPModel(CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=128))


class Batches:
    """Batches of (pixels, texts, which texts describe which images), each drawn from (seed, step): exact resume.

    An image has a caption, and in the lexicon a class and a group as well; a text names one of them, sometimes a style or the
    colour that the icon was given. Text j describes image i when all that it says holds for i, so that several texts
    describe an image (Khosla et al., Supervised Contrastive Learning, eq. 2) and no other "cat" counts as a negative.
    """

    def __init__(self, work: Path, size: int, seed: int) -> None:
        rows = json.loads((work / "rows.json").read_text())
        self.rows = [row for row in rows if not row["domain"]]
        self.images = np.load(work / "images.npy", mmap_mode="r")
        self.size, self.seed = size, seed
        counts = Counter(row["caption"] for row in self.rows)
        # Names that hundreds of icons share are drawn less often, lexicon icons more.
        weight = np.array([counts[row["caption"]] ** -0.3 * (4 if row["class"] else 1) for row in self.rows])
        self.weight = weight / weight.sum()
        self.colours = torch.tensor(list(COLOURS.values()), dtype=torch.float32)

    def __call__(self, step: int) -> tuple[Tensor, list[str], Tensor]:
        chance = np.random.default_rng((self.seed, step))
        torch_chance = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = sorted(chance.choice(len(self.rows), self.size, replace=False, p=self.weight))
        rows = [self.rows[i] for i in drawn]
        mono = torch.tensor([row["mono"] for row in rows])
        colour = torch.from_numpy(
            np.where(chance.random(self.size) < 0.5, 0, chance.integers(len(COLOURS), size=self.size))
        )
        pixels = self.paint(torch.from_numpy(self.images[drawn]), mono, colour, torch_chance)
        named = [list(COLOURS)[c] if m else None for c, m in zip(colour.tolist(), mono.tolist(), strict=True)]
        long = chance.random() < 0.15
        said = [self.say(row, c, LONG if long else SHORT, chance) for row, c in zip(rows, named, strict=True)]
        labels = [(row["caption"], row["class"], row["group"]) for row in rows]
        describes = torch.tensor([
            [noun in names and style in (None, row["style"]) and shade in (None, c) for _, noun, style, shade in said]
            for names, row, c in zip(labels, rows, named, strict=True)])  # fmt: skip
        return pixels, [text for text, *_ in said], describes

    @staticmethod
    def say(
        row: dict[str, Any], colour: str | None, templates: list[str], chance: np.random.Generator
    ) -> tuple[str, str, Any, Any]:
        noun = row["caption"]
        if row["class"] and (dice := chance.random()) < 0.4:
            noun = row["group"] if dice < 0.06 else row["class"]
        known = {"s": row["style"], "c": colour, "g": row["category"] or None}
        template = templates[chance.integers(len(templates))]
        if any(f"{{{key}}}" in template and not value for key, value in known.items()):
            template = templates[1]
        text = template.format(n=noun, **known)
        text = re.sub(r"\ba (?=[aeio])", "an ", text)
        return text, noun, *(known[key] if f"{{{key}}}" in template else None for key in ("s", "c"))

    def paint(self, images: Tensor, mono: Tensor, colour: Tensor, chance: torch.Generator) -> Tensor:
        """(n, 3, SIZE, SIZE) in [-1, 1]: moved, scaled, turned a little, on white or a tint; one-colour icons in `colour`."""
        n = len(images)

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=chance) * (high - low) + low

        images = images.permute(0, 3, 1, 2).float()
        alpha = images[:, 3:] / 255
        shade = (self.colours[colour] + uniform(-20, 20, 3)).clamp(0, 255)[:, :, None, None]
        premultiplied = alpha * torch.where(mono[:, None, None, None], shade, images[:, :3])
        angle, scale, stretch = uniform(-0.2, 0.2), uniform(0.85, 1.25), uniform(0.9, 1.1)
        move = uniform(-0.12, 0.12, 2)
        cos, sin = angle.cos() * scale, angle.sin() * scale
        theta = torch.stack(
            [torch.stack([cos * stretch, -sin, move[:, 0]], 1), torch.stack([sin, cos / stretch, move[:, 1]], 1)], 1
        )
        grid = F.affine_grid(theta, [n, 4, SIZE, SIZE], align_corners=False)
        moved = F.grid_sample(torch.cat([premultiplied, alpha], 1), grid, align_corners=False)
        tint = torch.where(uniform(0, 1, 1) < 0.7, 255.0, uniform(190, 255, 3))[:, :, None, None]
        return ((moved[:, :3] + (1 - moved[:, 3:]) * tint) / 127.5 - 1).clamp(-1, 1)


def embed(features: Any) -> Tensor:
    return F.normalize(features.pooler_output, dim=-1)


def multi_positive_loss(logits: Tensor, describes: Tensor) -> Tensor:
    """Mean over both directions of -sum_j p_ij log softmax(logits)_ij with p uniform over what describes i."""
    losses = []
    for scores, positive in ((logits, describes), (logits.T, describes.T)):
        target = positive.float() / positive.sum(1, keepdim=True)
        losses.append(-(target * scores.log_softmax(1)).sum(1).mean())
    return sum(losses) / 2


@app.command()
def train(
    work: Path = WORK, steps: int = 3000, batch: int = 256, rate: float = 1e-3, seed: int = 0, threads: int = 1
) -> None:
    """Contrastive training from the last checkpoint (every 3 minutes) to `steps`; the rate falls by a cosine to zero at `steps`."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = CLIPTokenizerFast.from_pretrained(work / "tokenizer")
    model, batches = new_model(tokenizer), Batches(work, batch, seed)
    torch.nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    average = copy.deepcopy(model).requires_grad_(False)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
                                  lr=rate, betas=(0.9, 0.98))  # fmt: skip
    step = load_checkpoint(work / "checkpoint.safetensors", model, average, optimizer)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(batches.rows)} images, from step {step}",
        flush=True,
    )
    saved = start = time.time()
    first, losses = step, []
    while step < steps:
        pixels, texts, describes = batches(step)
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        image = embed(model.get_image_features(pixel_values=pixels))
        text = embed(
            model.get_text_features(input_ids=tokens["input_ids"])
        )  # causal, pooled at the first end token: no mask
        loss = multi_positive_loss(model.logit_scale.exp() * image @ text.T, describes)
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
            for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                slow.lerp_(fast, max(0.005, 1 / (step + 1)))
        losses.append(loss.item())
        if step % 50 == 0:
            speed = (step - first) * batch / (time.time() - start)
            print(
                f"step {step} loss {np.mean(losses[-50:]):.3f} {speed:.0f} images/s {time.time() - start:.0f} s",
                flush=True,
            )
        if step == steps or time.time() - saved > 180:
            saved = time.time()
            save_checkpoint(work / "checkpoint.safetensors", model, average, optimizer, step)
            scores = accuracy(average, tokenizer, work, limit=600)
            print(json.dumps({"step": step} | {k: v["top1"] for k, v in scores.items()}), flush=True)


def save_checkpoint(
    path: Path, model: CLIPModel, average: CLIPModel, optimizer: torch.optim.Optimizer, step: int
) -> None:
    moments = {f"{i}.{k}": v for i, state in optimizer.state_dict()["state"].items() for k, v in state.items()}
    parts = {
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": moments,
        "loop": {"step": torch.tensor(step)},
    }
    tensors = {f"{part}/{k}": v.contiguous().clone() for part, values in parts.items() for k, v in values.items()}
    save_file(tensors, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(path: Path, model: CLIPModel, average: CLIPModel, optimizer: torch.optim.Optimizer) -> int:
    if not path.exists():
        return 0
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, value in load_file(path).items():
        part, _, name = key.partition("/")
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in parts["optimizer"].items():
        state[int(name.split(".")[0])][name.split(".")[1]] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(state)})
    return int(parts["loop"]["step"])


def on_white(images: np.ndarray) -> Tensor:
    """RGBA (n, 64, 64, 4) -> uint8 (n, 3, SIZE, SIZE) on white."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    pixels = pixels[:, :3] * (pixels[:, 3:] / 255) + 255 - pixels[:, 3:]
    return (
        F.interpolate(pixels, size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
        .round()
        .to(torch.uint8)
    )


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: Any, pixels: Tensor, labels: list[str], template: str = "an icon of a {}."
) -> dict[str, Any]:
    """top-1 and top-5 of uint8 pixels (n, 3, SIZE, SIZE) over the labels' own names."""
    names = sorted(set(labels))
    tokens = tokenizer([template.format(name) for name in names], padding=True, truncation=True, return_tensors="pt")
    text = embed(model.get_text_features(input_ids=tokens["input_ids"]))
    image = torch.cat(
        [embed(model.get_image_features(pixel_values=part.float() / 127.5 - 1)) for part in pixels.split(250)]
    )
    best = (image @ text.T).topk(min(5, len(names)), 1).indices
    hit = best == torch.tensor([names.index(label) for label in labels])[:, None]
    return {"top1": round(hit[:, 0].float().mean().item(), 4), "top5": round(hit.any(1).float().mean().item(), 4),
            "ways": len(names), "chance": round(1 / len(names), 4), "images": len(labels)}  # fmt: skip


def accuracy(model: CLIPModel, tokenizer: Any, work: Path, limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Zero-shot accuracy on icons of held-out vendors: names, classes, groups, classes per domain, unseen concepts."""
    rows = json.loads((work / "rows.json").read_text())
    images = np.load(work / "images.npy", mmap_mode="r")
    held = [i for i, row in enumerate(rows) if row["domain"]]
    emoji = [i for i in held if rows[i]["domain"] == "emoji"]
    known = [i for i in held if rows[i]["class"]]
    seen, unseen = ([i for i in known if rows[i]["unseen"] == flag] for flag in (False, True))
    questions = {
        "names, held-out vendors' emoji": ("caption", [i for i in emoji if not rows[i]["unseen"]]),
        "names, unseen concepts": ("caption", [i for i in emoji if rows[i]["unseen"]]),
        "groups": ("group", seen),
        "classes": ("class", seen),
        "classes, unseen concepts": ("class", unseen),
        **{f"classes, {domain}": ("class", [i for i in seen if rows[i]["domain"] == domain]) for domain in HELD_OUT},
    }
    result = {}
    for question, (field, indices) in questions.items():
        if limit and len(indices) > limit:
            indices = sorted(random.Random(0).sample(indices, limit))
        result[question] = zero_shot(model, tokenizer, on_white(images[indices]), [rows[i][field] for i in indices])
    return result


if __name__ == "__main__":
    app()
