"""Images in folders, on lists and in archives."""

import io
import tarfile

import pytest
import torch
from pretraining_common import pictures

from beit_plugin.data.image_list import ImageList
from beit_plugin.data.mim_views import ImageFiles, TwoViews

VIEWS = TwoViews(16, None)


def names(roots):
    found = ImageList(roots)
    return [found.name(i) for i in range(len(found))]


def shard(path, folder, files, mode='w', **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as tar:
        for file in files:
            tar.add(folder / file, file)
    return path


@pytest.fixture
def root(tmp_path):
    return pictures(tmp_path / 'data', 4)


class TestFiles:
    def test_folders_of_classes_and_lists(self, root, tmp_path):
        (root / 'class0/._0.png').write_bytes(b'of macOS')
        (root / 'notes.txt').write_text('no image')
        (root / 'source.tar').write_bytes(b'beside its images an archive is not read')
        found = names(root)
        assert [path.removeprefix(f'{root}/') for path in found] == [f'class{i % 2}/{i}.png' for i in (0, 2, 1, 3)]
        (tmp_path / 'list.txt').write_text(f'\ufeffdata/class1/3.png\n\n{found[0]}\n')
        listed = names(tmp_path / 'list.txt')
        assert listed == [str(tmp_path / 'data/class1/3.png'), found[0]]
        assert names([root, tmp_path / 'list.txt']) == found + listed

    @pytest.mark.parametrize(
        ('roots', 'sentence'),
        [
            ('nowhere', 'nowhere does not exist: give a folder of images or a text file'),
            ('empty', 'empty holds no images'),
            ('shards.txt', r'shards.txt lists archives \(.tar\): give these themselves'),
            ('file.md', 'file.md is neither a folder nor a list'),
            ('a.tar.gz', r'a.tar.gz is neither .* nor an archive \(.tar\): .* an archive that is not compressed'),
            ('latin.txt', r'the list latin.txt is not UTF-8 \(.* at byte 3\): save it as UTF-8'),
            ([], 'got no folder and no list'),
        ],
    )
    def test_sentences(self, tmp_path, monkeypatch, roots, sentence):
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'empty').mkdir()
        (tmp_path / 'file.md').touch()
        (tmp_path / 'a.tar.gz').touch()
        (tmp_path / 'latin.txt').write_bytes(b'caf\xe9.jpg\n')
        (tmp_path / 'shards.txt').write_text('\ufeffa.tar\nb.tar\n')
        with pytest.raises(ValueError, match=sentence):
            ImageList(roots)

    def test_links_are_followed_once(self, root, tmp_path):
        (tmp_path / 'elsewhere').mkdir()
        (root / 'class1/1.png').rename(tmp_path / 'elsewhere/1.png')
        (root / 'linked').symlink_to(tmp_path / 'elsewhere')
        (root / 'another class0').symlink_to(root / 'class0')  # its images are those of class0
        expected = ['class0/0.png', 'class0/2.png', 'class1/3.png', 'linked/1.png']
        for folder in (root, root / 'class0', root / 'class1', tmp_path / 'elsewhere'):
            for i in range(8):  # each doubles the walk at every depth
                (folder / f'loop{i}').symlink_to(root)
        assert [path.removeprefix(f'{root}/') for path in names(root)] == expected

    def test_a_folder_that_may_not_be_listed(self, root, monkeypatch):
        def refuse(path):
            raise PermissionError(13, 'Permission denied', path)

        monkeypatch.setattr('os.scandir', refuse)
        with pytest.raises(PermissionError):
            ImageList(root)

    def test_digest(self, root, tmp_path):
        before = ImageList([root, shard(tmp_path / 'a.tar', root, ['class0/0.png'])]).digest()
        (tmp_path / 'moved').mkdir()
        for name in ('data', 'a.tar'):
            (tmp_path / name).rename(tmp_path / 'moved' / name)
        moved = [tmp_path / 'moved/data', tmp_path / 'moved/a.tar']
        assert ImageList(moved).digest() == before
        assert ImageList(moved[::-1]).digest() != before
        (tmp_path / 'moved/data/class0/0.png').rename(tmp_path / 'moved/data/class0/9.png')
        assert ImageList(moved).digest() != before


class TestArchives:
    @pytest.mark.parametrize('options', [{}, dict(format=tarfile.GNU_FORMAT), dict(format=tarfile.PAX_FORMAT)])
    def test_are_read_as_the_files_in_them(self, root, tmp_path, options):
        long = f'class0/{"x" * 150}.png'
        (root / 'class0/0.png').rename(root / long)
        files = ['class1/3.png', long, 'class0/2.png', 'class1/1.png']
        shards = shard(tmp_path / 'shards/b/1.tar', root, files[:3], **options).parents[1]
        shard(shards / 'a.tar', root, files[3:], **options)
        inside = ImageFiles(shards, VIEWS)
        order = files[3:] + files[:3]
        assert [inside.path(i) for i in range(4)] == [
            f'{shards}/{archive}/{name}' for archive, name in zip(['a.tar'] + ['b/1.tar'] * 3, order, strict=True)
        ]
        outside = {names(root)[i]: ImageFiles(root, VIEWS).image(i).tobytes() for i in range(4)}
        assert [inside.image(i).tobytes() for i in range(4)] == [outside[f'{root}/{name}'] for name in order]
        (tmp_path / 'list.txt').write_text(f'data/{order[0]}\n')
        mixed = ImageFiles([tmp_path / 'list.txt', shards / 'b/1.tar', root], VIEWS)
        found = [mixed.image(i).tobytes() for i in range(8)]
        assert found[:4] == [outside[f'{root}/{name}'] for name in order] and found[4:] == list(outside.values())

    def test_workers_read_at_once(self, root, tmp_path):
        whole = TwoViews(16, None, scale=(1.0, 1.0), ratio=(1.2, 1.2), color_jitter=0.0, hflip=0.0)
        files = ImageFiles(shard(tmp_path / 'a.tar', root, ['class1/3.png', 'class0/2.png']), whole)
        batches = list(torch.utils.data.DataLoader(files, 1, num_workers=2))
        for i in range(2):
            assert torch.equal(batches[i]['inputs'][0], files[i]['inputs'])

    def test_only_images_are_members(self, root, tmp_path):
        with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
            tar.add(root, 'data')  # folders too
            for name, kind in (('a.png', tarfile.SYMTYPE), ('b.png', tarfile.LNKTYPE), ('c.png', tarfile.FIFOTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, 'data/class0/0.png'
                tar.addfile(member)
            for name in ('0.json', '._0.png'):
                member = tarfile.TarInfo(name)
                member.size = 3
                tar.addfile(member, io.BytesIO(b'xyz'))
        assert sorted(names(tmp_path / 'a.tar')) == [
            f'{tmp_path}/a.tar/data/class{i % 2}/{i}.png' for i in (0, 2, 1, 3)
        ]
        (tmp_path / 'empty').mkdir()
        shard(tmp_path / 'empty/a.tar', root, [])
        with pytest.raises(ValueError, match='empty holds no images'):
            ImageList(tmp_path / 'empty')

    def test_broken_members_are_named(self, root, tmp_path):
        (root / 'class0/0.png').write_bytes(b'no image')
        (root / 'class0/2.png').write_bytes((root / 'class0/2.png').read_bytes()[:300])
        archive = shard(tmp_path / 'a.tar', root, ['class0/0.png', 'class0/2.png', 'class1/1.png'])
        met = {}
        files = ImageFiles(archive, VIEWS, met.__setitem__)
        for i in range(3):
            assert files[i]['inputs'].shape == (3, 16, 16)
        assert sorted(met) == [f'{archive}/class0/{i}.png' for i in (0, 2)]
        name = f'{archive}/class0/0.png'
        expected = f'image {name!r} cannot be read as an image (cannot identify image file {name!r}): '
        assert met[name] == expected + 'fetch or save it again'
        archive.unlink()
        with pytest.raises(ValueError, match=r'a.tar/class1/1.png. cannot be read \(No such file or directory\)'):
            ImageFiles.image(files, 2)

    @pytest.mark.parametrize(
        'damage',
        [
            'compressed',
            'within a member',
            'between members',
            'header',
            'zeroed header',
            'zeros',
            'two',
            'empty',
            'noise',
        ],
    )
    def test_damaged_and_compressed_ones_are_refused(self, root, tmp_path, damage):
        files = ['class0/0.png', 'class1/1.png']
        archive = shard(tmp_path / 'a.tar', root, files, 'w:gz' if damage == 'compressed' else 'w')
        content = bytearray(archive.read_bytes())
        second = 0
        if damage != 'compressed':
            with tarfile.open(archive) as tar:
                second = tar.getmembers()[1].offset
        if damage in ('header', 'zeroed header'):
            content[second : second + 512] = (b'\xff' if damage == 'header' else b'\0') * 512
        elif damage == 'zeros':  # space that was set aside for what did not arrive
            content[second:] = bytes(20_000)
        elif damage == 'two':
            content *= 2
        cut = {'within a member': second - 600, 'between members': second, 'empty': 0}.get(damage, len(content))
        archive.write_bytes(b'\x01' * 2000 if damage == 'noise' else content[:cut])
        with pytest.raises(
            ValueError, match=r'the archive \S+a.tar is compressed or damaged \(.+\): uncompress'
        ) as caught:
            ImageList(archive)
        assert '\n' not in str(caught.value)
