"""A few tiny JPEGs whose pixels say which decoder this is.

Decoders round differently: libjpeg-turbo, nvJPEG and its hardware engine differ by a level here and there, and the
next version of any of them may differ from itself. A store keeps the digests of these images, as its maker decoded
them. Whoever replays it decodes them anew: another version with equal pixels is as good as the same one, and any other
decoder is refused before the first batch.
"""

import base64
import zlib
from functools import cache
from typing import Any

import numpy as np

from cache import UserError
from pipeline.data import dali
from pipeline.data.decode import as_rgb, decode

PIXELS = "pixels"
"""The key of `identity` that holds the digests."""

_ANEW = "or run precompute-teacher into another store"


def identity(decoder: str) -> dict:
    """What decides the decoded bytes, kept in a store's manifest: who decodes, how, and the probes' digests.

    `decoder` is "cpu", or one of `pipeline.data.dali.ENGINES`, which takes the current CUDA device.
    """
    return _settings(decoder) | {PIXELS: pixels(decoder)}


def decoder_of(found: dict) -> str:
    """Who decodes for a store with this `identity`; UserError if that is none of ours."""
    settings = {name: value for name, value in found.items() if name != PIXELS}
    for decoder in ("cpu", *dali.ENGINES):
        if _settings(decoder) == settings:
            return decoder
    raise UserError(
        "the store's pixels come from an unknown decoder", found=settings, fix=f"update this package, {_ANEW}"
    )


def check(found: dict, versions: dict) -> None:
    """Raise UserError if the decoder at hand gives other pixels than the one with the `identity` found.

    `versions` are those in the store's manifest. Stores from before there were probes are taken as they are.
    """
    decoder = decoder_of(found)
    if PIXELS not in found or (here := pixels(decoder)) == found[PIXELS]:
        return
    kept = found[PIXELS] if isinstance(found[PIXELS], dict) else {}
    differing = [name for name in here if here[name] != kept.get(name)]
    raise UserError(
        f"the decoder here gives other pixels than the store's ({decoder}: {', '.join(differing)})",
        found=dali.version(),
        expected=f"the pixels of {versions.get('decoding') or 'DALI ' + str(versions.get('dali'))}",
        fix=f"install that version, {_ANEW}",
    )


@cache
def pixels(decoder: str) -> dict[str, str]:
    """Probe -> CRC-32 of its pixels u8 (H, W, 3), eight hex digits; with several engines of the pixels of each."""
    encoded = [as_rgb(data) if name == "CMYK" else data for name, data in PROBES.items()]
    found = [b""] * len(encoded)
    for images in (_on_cpu if decoder == "cpu" else _on_gpu)(encoded, decoder):
        found = [before + image.tobytes() for before, image in zip(found, images, strict=True)]
    return {name: f"{zlib.crc32(data):08x}" for name, data in zip(PROBES, found, strict=True)}


def _settings(decoder: str) -> dict[str, Any]:
    if decoder == "cpu":
        return {"backend": "libjpeg-turbo", "fancy_upsampling": True, "orientation": False}
    engine: dict[str, Any] = {"hw_decoder_load": int(dali.ENGINES[decoder][0])}
    if decoder == "gpu-both":
        engine = {"hw_decoder_load": dali.ENGINE_SHARE, "routed_by": "key hash"}
    return {"backend": "nvjpeg", **engine, "fancy_upsampling": True, "orientation": False}


def _on_cpu(encoded: list[bytes], _) -> list[list[np.ndarray]]:
    return [[decode(data).copy() for data in encoded]]


def _on_gpu(encoded: list[bytes], decoder: str) -> list[list[np.ndarray]]:
    import torch

    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    found = []
    for engine in dali.ENGINES[decoder]:
        pipeline = dali.Batches(len(encoded), 1, device, engine)
        pipeline.schedule(encoded)
        images = pipeline.take(None)
        found.append([np.asarray(image) for image in (images if device is None else images.as_cpu())])
    return found


PROBES: dict[str, bytes] = {
    name: base64.b85decode("".join(text.split()))
    for name, text in {
        "baseline": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00jdC1Ox*G1Ox;H1qB8N3<w7Y2L}%e3keJn4-yg)4-pX)791B76dDx~5f~vD8XX-UA0HDJA|xUnBpe<e9{
<|_LjeT^1qTKP4hRSi9uyH29v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v=U|01*fP7yuvx0U`hb5di}c0sq7
R8vp<T0R;d60000000000000071pxvC1_=Me03r|o0R#d90s{d6000000000100IL91rY`kAu$IOGEx7;02ToO0RaF20000000000000051_%Gd0
3s0p0RsdA0s{a500000000010s{m91qKlkArllNF;V~801N{G00I#M5dc2`o4|4V6zwucw15g?-O9q;5v*K0b<&2tmV`ul=`Z<jB7I2Yk**{JUO$
#QcH4Jh!+%vPHz2m5#ItTuP*+B=Ekx*Z#?!w&wwe5Q<Q#1ZY>G)*2p`qWj_0!8$$dVD$=39@ygwD6D_yhqBe37JR!t5ywLxv2gH23}3m$1NFs+sL
YUwi*JZQM6`z#p^vQHqP2zL?^;z+BEa~ZaJuDRhG1FEJkgivj!*%6N0-=xIExY2>Jv%moeTGlxRJodgyd29BuS<fx$ZZ@;94^{u!
""",
        "odd sides": """
|JeWF01!$>Nk#wx0RR9200961|JwjV015{O2nPlV2nYxZ3JMDj7!VE(4GtX@77-XDA0;FrA0i<pD>pADDKse|A}~QQG&wsyK0YNbL`g$DNH;w`JO
A4NLjej43l0qq91sv3J18P3J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Bi&J3Ift01*fP6#yLr0U`hb5di}c0sq7
R82|tR0|5X40000000000000040R;yF|HJ?!5C8!L0s#a90{{R300000009630|W&T5(Xh6F%v;EagqPT02ToO0RaF20000000000000040|x)Z0
3Q(m0s#aA0RaF200000000010ssR95g`R4F=284+5ij#0RRFK0}%i}0C49byWrntK*393^KajD)yxfQF&QhJxO!E%+`dJ(J|{5n2T3mC{S8VwQSN
<|OF)##2O@Q11Bh=qI{=YAVO58TaO|wQyvbsRfZK@rSzMU=h2-#mwQf4@*=gZUKVfM08Ka^0ZBaPL?Ktcv%}7|zL4Y695QEEfU>8t)3o|Lnh+2)Z
0@n?MfydY1;~&H!VlP>irU8w->e`?G*#
""",
        "4:4:4": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00RO70|EjA0|NsD0|NvF2n7WM1O*BQ2L=cX3JeSj3JVJj4iXRz4iOFu3lJ6%5fc;@6%`B*7Z?^47!ni}6#
v@*LjeN>1O)^I2?YfS6b%av6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6ciK`6cqo!01*fP7yuXp0TBQK5di}c0sq7
R7XSeP0RaF20000000000000LF0SW)a03#3p00sgA0R;d600000000010s{mF5dZ}eQ6UEi7BNBp!~huq00IL60000000000000002M7fQ2?YPd0
3i_o0R#d90|5a5000000000100IL91qKHZ5)&~&QUBTi3<CiG0ucid06zezrylNOJI!I+G;m8WRROZuh`?C)cHpCSdT*y#x#-S2ze-N%PJw_xM(`
)gk(w?6=ud`-<X%K!D(TS{=#-}GD%!0#+pHYLWtSTyN1_)sqL7!Wy)QQg5WlWi{=qYAyRs8Uu;63OKw)Y6o?@~;fC@!9?(6pyo?@!(v%I4p7e1NA
Vw+tff`5ok)7~>8yo1Phfb1^KE(RY%oAC<wV9ZU&L_ZW`qI`5$D28ed(NUD@85pPZ&4zpS+Z)Qse&tnEC5ZUJP74PP#pEX)rtV8`rBIfC5)Y^H*9
~>VDNZ$A;InDt`Y>574O!R883)aM<dy%~
""",
        "4:2:2": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00jdC1Ox*G1Ox;H1qB8N3<w7Y2L}%e3keJn4-yg)4-pX)791B76dDx~5f~vD8XX-UA0HDJA|xUnBpe<e9{
<|_LjeT^1qTKP4hRSi9uyH29v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v=U|01*fP695?l0U-ba5di}c0sq7
R82|tR0|5X40000000000000CA00jpF|HJ?#5C8!K1ONpE0000000000009630|W&I5fvdKF;NE+6hTt|!~hrp0RRI50000000000000002LlBL2
>-+YBM|@r1OfpA1poj500000000330|W&C1`#4bQ4$j&F*E<#01N{G00I#M5dc2`#Vav-idf6u(g0VOJ#%gH>BF*Bs@oZQsmFX}-JLP2keMX&#yC
|>E*)(;Li|JJ4OwmNDngDiQUfj$9v#LqWbU+H>0M1~4Kk6Tq?2#LF4p<X)p3x*b`<rIq}8k2k@=sz1%%~+u|rlzpyi(pt#2p+(wsWy;H>2OMaYu3
7#$@1V>>(T6><cAc=YE#OF87RH1^o!w;cK?+iZ-rjU6NDDQ_Sq2_rBYcmiu=c*J{qT3gs6{f+#ET|$sxpq%Edh4%#YfUf!f*#
""",
        "gray": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00jdC1Ox*G1Ox;H1qB8N3<w7Y2L}%e3keJn4-yg)4-pX)791B76dDx~5f~vD8XX-UA0HDJA|xUnBpe<e9{
<1q3kU!a02cuP5di<h02TlN0RaF20000000000000062L=Dc03{Fr0Rsd81qA>A00000000020Rsd81qKla5+O8k2NW?jLI2tS2mt{A06zfGxA4&
(+~PRp;y9vp>S;~v?#96290p$rT*=F@UDTg6z$E2&H!dKGC~LhcQMNLSuQxAaZ@RwGm+BpALVD?eIw_J$IjT$YYr3J?Jx{cpQ6Y>dnyAkXzhiI8Q
qCs(rf5z#*awRL*#
""",
        "CMYK": """
|JeWT01iQ9Z(?NtWB>pF0095n07C!;0|W#F0|f*G1O){J1_ulX2L}fS4+{$k3=t0!5)ls(5fc_17ZVg36%i2_As8AR9UmVb6Bi;RA|50h9v>e6zy
K5o01*Ha1Va%3O%VWD5dcdO0RO}Q82|tS0RaI30000000000000ID2n7NJ|HJ?>5C8!K0t5pE2L%8C00000009C61ONpF2N59%F>(?VG&OM(6*oa
)vB4rTHc@l`+5ip&LjX+xSpZ7_06zdZ;(Hs%uv=POQY4a~G)D9}lva20o_p5>Yc);|NZ;*Vd=r!NvYzelSKTrSkIQ-*&zw5V=Gp@ikfM{W#<T1=v
NCen7p1HvWjgyZcdl^uDv+$&IEl!PAQkJ`BkNE2_}MXV@@B2FHsom;3M20kVM}TxZKxEydpjFLs!w-b$4aGJ&N$@>CK|QV`k|HQJanw5*&VA{Ia6
{{LV;d~>0TVRhcg*W?)P_0l>CDCrFDgtGTq?*C_tXt_5pj*Hf>LjVuXh$AUc(D){U}e(R$1os*I_NAPsjkVVF5rd9qj+ITDm0fv9M5qPvC>wOwt8
7r=<yQPw*_0W=kg=CJ++@9ZEYvN;MNpN1n~yhx)pw78@l$rOlq#Y3t}nn@t<LW{dw+fhe%PwCs0PjWE}LG_Nn*wF$r63B#v_eAZtDsS-L=SlUh_@
(eMy2swC4k-Mck5O6N40-FlKZ>L?%i(*SABtyTFMw=+l?L5D5T~c{TRcR6B$Mk<JntCqQKUSt66aM+viwV(RFGfqKDGbZ
""",
        "progressive": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&6c`v66c!d59VH(c8zUSR79cDjBPJ&)Dk&KsEif%8FeNA{DF
534LjeZ|2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@BBJ01*fP7XTpx0U`hb5di}c0sq7
R82|tR0|5X40000000000000060|W&D|HJ?p0RaF40{{R3000000000000aXC00IX8+5ij#0RRFJ0}ucJ0m*GzjLN#a?-tM_4yHGkf`NEe!t0Wl2
;Kk0038qj0s;a90RR9100000000010ssR91rZV<6#v=)2mt{A0R;k~x;1-R#d$W1jhN++%FxlwO@A#`3aYh1XHgV-d`HP}=;eg}!~h-<00IF61po
j500000000000RjL61Q8MwAtNOJ+5iXv0|5a)0cv(+dCa$daMP|m6ht~iqQ`X1ng7H99}xfn0|NyB0000000000000620R#gP6A~36F;V~800;pB
0RcY&I<(|;vd4+YE#woEi8YpiaBHkV;{U_|8xQ~j0R;d600000000000000HAOR2(Au<2j00;pA00ut-bunh6*r$L0!~h!*00RI50{{R30000000
000009vpVGuDv|Jncu0RaF3KOstjoRn~W%n=%iVI8()s5*$%#O)$sfpE%y|Jncy0|5X600RI301!bu!3aP9!~h!+0RRF50{{R300000000000RRy
YAwf}L|Jncu0RsU6KM=Jt`vH71`@{e>7B`Fk!~hx*0RRF60RR9100000000000RRyYAu(b9+5iXv0s#R(5MG|3I~99?fz(<Ho=N}202~kj0RaI30
s{a5000000000101+WkVKG6G|Jncu0RaF3KM>;ZFb+pPZtD>um$&(8kGYvcVs3!*F~Pk^k#}=Kc#JV6)wkyV*#
""",
        "restart markers": """
|JeWF01!$>Nk#wx0RR9200961|JwjV00jdC1Ox*G1Ox;H1qB8N3<w7Y2L}%e3keJn4-yg)4-pX)791B76dDx~5f~vD8XX-UA0HDJA|xUnBpe<e9{
<|_LjeT^1qTKP4hRSi9uyH29v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v&VZ9v=U|01*fP7yu{(0U`hb5di}c0sq7
R82|tS0RaI30000000000000052L=KJ|HJ?z5C8!L0s;a80{{R300000009630|W&T1|bI$6EQ(iVgJMc7y$qS0RaF20000000000000C91_ucL!
~h}@009I70s#d800000000000RRF61O*WW5+Mf^A|qk{-2emt0sq<n3<CiG0ucid06zftA1C6cK8=~XKh@K6u;qJ&+uDoJ;WEcKcg#+Y?NfM;J@g
_QCE7w^VZq}h4~9ZYD(@i$nyKWk|Ilw82@7|mhmy)EFqt~ieP=Y<%=LFk7Dlr<05P@0wW7Agd)2g0#Y;l$!!C=3gF%1)(VSo9RN|1e&iW`?S-dd&
t}+K6`$Bam9>O`qnF^<a)a;Z@3@siP|I(Ua^K;8#tu8&4XyJ9+ZkTh%&X9#K$ZN+0dyHu`=d_@sU$u7iKa2m<SLG=U4{wjHEa#82R%E!)Tu*31L&
k4T?J&E-&1__?dj}rnfB)2?;I2yQ%p`sgge!=u#O8upxjxQv_>ldjfB)G
""",
    }.items()
}
"""Name -> JPEG: what is special about it."""
